"""Chooses the engine of a stage: eager, captured as CUDA graphs, or DeepSpeed. One loop (`trainer.py`) drives all."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sgg_fast import env
from sgg_fast.config import OptimConfig
from sgg_fast.train.engines.base import Engine, resolve_precision
from sgg_fast.train.engines.captured import CapturedEngine, why_eager
from sgg_fast.train.engines.deepspeed import DeepSpeedEngine
from sgg_fast.train.engines.ds_config import check_engine, load_ds_config
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.stages import Stage

logger = logging.getLogger(__name__)


def plan_engine(optim: OptimConfig, stage: str, device: torch.device, ds_path: str | None) -> dict[str, Any] | None:
    """The resolved DeepSpeed configuration, or None without DeepSpeed. Raises `ConfigError`; builds nothing."""
    check_engine(optim, stage, ds_path)
    if ds_path is None:
        return None
    return load_ds_config(ds_path, optim, resolve_precision(optim, device), env.world_size())


def build_engine(module: Stage, device: torch.device, ds_config: dict[str, Any] | None = None) -> Engine:
    """Build the engine that `plan_engine` chose. Without DeepSpeed, on a GPU, its steps are captured where possible."""
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
        torch.cuda.empty_cache()  # what setting up freed, in blocks that fit no step
        logger.info("training steps: %s", engine.execution)
    return engine
