"""Which engine runs a stage: plain, replayed as CUDA graphs, or DeepSpeed. One loop above all (`trainer.py`)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from sgg_fast import env, ops
from sgg_fast.config import Config, ConfigError
from sgg_fast.train.engines.base import Engine, resolve_precision
from sgg_fast.train.engines.captured import PretrainReplay
from sgg_fast.train.engines.captured_finetune import FinetuneReplay, why_eager
from sgg_fast.train.engines.deepspeed import DeepSpeedEngine
from sgg_fast.train.engines.ds_config import load_ds_config
from sgg_fast.train.engines.eager import PlainEngine
from sgg_fast.train.stages import FinetuneStage, PretrainStage

logger = logging.getLogger(__name__)


def plan_engine(config: Config, stage: str, device: torch.device, ds_path: str | None) -> dict[str, Any] | None:
    """The resolved DeepSpeed configuration, None for the plain engine. Raises `ConfigError`; builds nothing."""
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


def build_engine(
    module: nn.Module, config: Config, stage: str, device: torch.device, ds_config: dict[str, Any] | None
) -> Engine:
    """The engine that `plan_engine` chose; without DeepSpeed, on a GPU, one that replays its steps where it can."""
    reason = _why_eager(module, config, device, ds_config)
    engine: Engine
    if ds_config is not None:
        engine = DeepSpeedEngine(module, config, ds_config, device)
    elif reason is not None:
        engine = PlainEngine(module, config, stage, device)
    elif isinstance(module, FinetuneStage):
        engine = FinetuneReplay(module, config, device)
    else:
        assert isinstance(module, PretrainStage)
        engine = PretrainReplay(module, config, device)
    if reason is not None:
        engine.execution = f"eager ({reason})"
    if device.type == "cuda":
        logger.info("training steps: %s", engine.execution)
    return engine


def _why_eager(module: nn.Module, config: Config, device: torch.device, ds_config: dict[str, Any] | None) -> str | None:
    """Why steps are not captured; None where they are."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, not {device.type}"
    if ds_config is not None:
        return "DeepSpeed moves weights and runs hooks of its own"
    if not config.cuda_graphs:
        return "--no-cuda-graphs"
    if ops.backend_for(device, torch.float32) != "triton":
        return "the reference forms of the kernels wait for the device"
    return why_eager(config, device, module.cache) if isinstance(module, FinetuneStage) else None
