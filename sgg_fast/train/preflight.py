"""Checks before torch is loaded: settings, flags and folders that need neither a device nor a model."""

from __future__ import annotations

from pathlib import Path

from sgg_fast import env
from sgg_fast.config import Config, ConfigError
from sgg_fast.train.engines.ds_config import check_engine
from sgg_fast.train.run.folder import check_folder


def preflight(config: Config, stage: str, out: Path, ds_path: str | None, graph_encoder: Path | None) -> None:
    """Check the settings. Raises `ConfigError`; reads and writes nothing except the files that it checks.

    `train.py` calls it to answer fast; `Trainer` calls it for all other callers.
    """
    config.check_given()
    conditioner = config.model.conditioner
    if stage == "pretrain" and conditioner != "sgg":
        raise ConfigError(f"--conditioner {conditioner} has no pre-training: go on with --stage finetune")
    check_engine(config.optim, stage, ds_path)
    if graph_encoder and stage == "finetune":
        if conditioner != "sgg":
            raise ConfigError(f"--graph-encoder {graph_encoder} is of SGG-IG: leave out --conditioner or the folder")
        if not graph_encoder.is_dir():
            raise ConfigError(f"--graph-encoder {graph_encoder}: there is no such folder")
    if env.rank() == 0:
        check_folder(out / stage)
