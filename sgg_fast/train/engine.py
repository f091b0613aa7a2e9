"""Engines: how a stage is run forward, backward and updated. One training step above both (`trainer.py`).

The only place, with `optim.py`, that knows of DeepSpeed and bitsandbytes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import io
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgg_fast import env
from sgg_fast.config import Config, ConfigError
from sgg_fast.train.ds_config import load_ds_config
from sgg_fast.train.optim import build_optimizer, set_lr
from sgg_fast.train.stages import Terms

logger = logging.getLogger(__name__)

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and DeepSpeed's launcher set for each process."""


class Engine(Protocol):
    """What the trainer needs of an engine."""

    module: nn.Module

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Loss terms of this process's samples."""

    def update(self, total: torch.Tensor, lr_factor: float = 1.0) -> None:
        """Backward, clip, optimiser step at `lr_factor` times the learning rates."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over processes of a vector."""

    def barrier(self) -> None:
        """Wait for every process."""

    def save(self, folder: Path) -> None:
        """Write weights and optimiser into `folder`."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


def resolve_precision(config: Config, device: torch.device) -> str:
    """ "bf16" or "fp32": auto is bf16 on CUDA, fp32 on CPU, where bf16 is slower."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


class PlainEngine:
    """One process: fp32 parameters, autocast to bf16 where asked."""

    def __init__(self, module: nn.Module, config: Config, stage: str, device: torch.device) -> None:
        self.module = module.to(device)
        self.optimizer = build_optimizer(module, config, stage)
        self.max_grad_norm = config.max_grad_norm
        bf16 = stage == "finetune" and resolve_precision(config, device) == "bf16"
        self._autocast = lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """See `Engine`."""
        with self._autocast():
            return self.module(ids, step)

    def update(self, total: torch.Tensor, lr_factor: float = 1.0) -> None:
        """See `Engine`."""
        set_lr(self.optimizer, lr_factor)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.max_grad_norm:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        return values

    def barrier(self) -> None:
        """See `Engine`."""

    def save(self, folder: Path) -> None:
        """Weights as safetensors; the optimiser as a torch file that loads with weights_only."""
        save_file({k: v.contiguous() for k, v in self.module.state_dict().items()}, folder / "weights.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        self.module.load_state_dict(load_file(folder / "weights.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))


class DeepSpeedEngine:
    """DeepSpeed ZeRO with the recipe's optimiser as client optimiser; with a launcher or without."""

    def __init__(self, module: nn.Module, config: Config, ds_config: dict[str, Any], device: torch.device) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = _import_deepspeed()
        if "RANK" not in os.environ:
            os.environ.update(_alone())
        try:
            with _held_output():
                if not torch.distributed.is_initialized():
                    atexit.register(_leave)
                backend = "nccl" if device.type == "cuda" else "gloo"
                deepspeed.init_distributed(dist_backend=backend, verbose=False)
                module.to(device)
                self.optimizer = build_optimizer(module, config, "finetune")
                self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=ds_config)
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--deepspeed: DeepSpeed refuses these settings: {reason}") from error
        self.module = self.engine.module

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """See `Engine`."""
        return self.engine(ids, step)

    def update(self, total: torch.Tensor, lr_factor: float = 1.0) -> None:
        """See `Engine`."""
        set_lr(self.optimizer, lr_factor)
        self.engine.backward(total)
        self.engine.step()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        torch.distributed.all_reduce(values)
        return values / env.world_size()

    def barrier(self) -> None:
        """See `Engine`."""
        torch.distributed.barrier()

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint; our manifest beside it holds the hashes of its files."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed")

    def load(self, folder: Path) -> None:
        """See `Engine`; the caller has checked the manifest."""
        path, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise ConfigError(f"{folder}: DeepSpeed cannot read this checkpoint")


def _import_deepspeed() -> Any:
    """The package, its log led to ours. One warning is left out: the optimiser is tested, by our own suite."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--deepspeed: the package deepspeed is not installed (pip install deepspeed)")
    with _held_output():
        import deepspeed

    chatter = deepspeed.utils.logger
    if chatter.handlers:
        chatter.handlers.clear()
        chatter.propagate = True
        chatter.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    return deepspeed


def _alone() -> dict[str, str]:
    """What a launcher would set for a single process; without it DeepSpeed looks for MPI. The port is a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = zip(LAUNCHER, ("0", "0", "1", "127.0.0.1", str(port)), strict=True)
    return {name: value for name, value in alone if name not in os.environ}


def _leave() -> None:
    """At exit and not before: DeepSpeed keeps the group for every later engine of the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _held_output() -> Iterator[None]:
    """DeepSpeed prints to stdout what is a log line; it goes to our log, or to stderr if the block fails."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held):
            yield
    except BaseException:
        sys.stderr.write(held.getvalue())
        raise
    if held.getvalue().strip():
        logger.debug("%s", held.getvalue().strip())


def plan_engine(config: Config, stage: str, device: torch.device, ds_path: str | None) -> dict[str, Any] | None:
    """The resolved DeepSpeed configuration, None for the plain engine. Raises `ConfigError`; builds nothing."""
    if stage == "pretrain" and (ds_path is not None or env.world_size() > 1):
        raise ConfigError("--stage pretrain runs in one process and without --deepspeed; it fits any GPU as it is")
    if ds_path is None and env.world_size() > 1:
        raise ConfigError("several processes need DeepSpeed: add --deepspeed ds.json")
    if ds_path is None:
        return None
    return load_ds_config(ds_path, config, resolve_precision(config, device), env.world_size())


def build_engine(
    module: nn.Module, config: Config, stage: str, device: torch.device, ds_config: dict[str, Any] | None
) -> PlainEngine | DeepSpeedEngine:
    """The engine that `plan_engine` chose."""
    if ds_config is None:
        return PlainEngine(module, config, stage, device)
    return DeepSpeedEngine(module, config, ds_config, device)
