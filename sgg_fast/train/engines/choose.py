"""Which engine runs a stage: eager, captured as CUDA graphs, or DeepSpeed. One loop above all (`trainer.py`)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sgg_fast import env
from sgg_fast.config import Config, ConfigError
from sgg_fast.train.engines.base import Engine, resolve_precision
from sgg_fast.train.engines.captured import CapturedEngine, why_eager
from sgg_fast.train.engines.deepspeed import DeepSpeedEngine
from sgg_fast.train.engines.ds_config import load_ds_config
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.stages import Stage

logger = logging.getLogger(__name__)


def plan_engine(config: Config, stage: str, device: torch.device, ds_path: str | None) -> dict[str, Any] | None:
    """The resolved DeepSpeed configuration, None without DeepSpeed. Raises `ConfigError`; builds nothing."""
    if stage == "pretrain" and (ds_path is not None or env.world_size() > 1):
        raise ConfigError("--stage pretrain runs in one process and without --deepspeed; it fits any GPU as it is")
    if ds_path is None and env.world_size() > 1:
        raise ConfigError("several processes need DeepSpeed: add --deepspeed ds.json")
    if ds_path is None:
        return None
    for name, used in ((f"--weights {config.weights}", config.bf16_weights),
                       ("--optimizer-in-backward", config.optimizer_in_backward)):  # fmt: skip
        if used:
            raise ConfigError(f"{name} runs without --deepspeed, which keeps master weights of its own: leave one out")
    return load_ds_config(ds_path, config, resolve_precision(config, device), env.world_size())


def build_engine(module: Stage, device: torch.device, ds_config: dict[str, Any] | None = None) -> Engine:
    """The engine that `plan_engine` chose; without DeepSpeed, on a GPU, one that captures its steps where it can."""
    engine: Engine
    if ds_config is not None:
        engine = DeepSpeedEngine(module, ds_config, device)
    elif device.type != "cuda":
        engine = EagerEngine(module, device, f"CUDA graphs need a GPU, not {device.type}")
    elif (reason := why_eager(module, device)) is not None:
        engine = EagerEngine(module, device, reason)
    else:
        engine = CapturedEngine(module, device)
    if device.type == "cuda":
        logger.info("training steps: %s", engine.execution)
    return engine
