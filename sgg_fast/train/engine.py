"""Which engine runs a stage: plain, or DeepSpeed. One training step above both (`trainer.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sgg_fast import env
from sgg_fast.config import Config, ConfigError
from sgg_fast.train.base import Engine, resolve_precision
from sgg_fast.train.ds_config import load_ds_config
from sgg_fast.train.ds_engine import DeepSpeedEngine
from sgg_fast.train.plain import PlainEngine
from sgg_fast.train.replay import ReplayEngine
from sgg_fast.train.stages import PretrainStage


def plan_engine(config: Config, stage: str, device: torch.device, ds_path: str | None) -> dict[str, Any] | None:
    """The resolved DeepSpeed configuration, None for the plain engine. Raises `ConfigError`; builds nothing."""
    if stage == "pretrain" and (ds_path is not None or env.world_size() > 1):
        raise ConfigError("--stage pretrain runs in one process and without --deepspeed; it fits any GPU as it is")
    if ds_path is None and env.world_size() > 1:
        raise ConfigError("several processes need DeepSpeed: add --deepspeed ds.json")
    if ds_path is None:
        return None
    for name, used in (("--weights lean", config.weights == "lean"),
                       ("--optimizer-in-backward", config.optimizer_in_backward)):  # fmt: skip
        if used:
            raise ConfigError(f"{name} runs without --deepspeed, which keeps master weights of its own: leave one out")
    return load_ds_config(ds_path, config, resolve_precision(config, device), env.world_size())


def build_engine(
    module: nn.Module, config: Config, stage: str, device: torch.device, ds_config: dict[str, Any] | None
) -> Engine:
    """The engine that `plan_engine` chose."""
    if isinstance(module, PretrainStage) and config.cuda_graphs and device.type == "cuda":
        return ReplayEngine(module, config, device)
    if ds_config is None:
        return PlainEngine(module, config, stage, device)
    return DeepSpeedEngine(module, config, ds_config, device)
