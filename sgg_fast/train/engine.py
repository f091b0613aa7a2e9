"""Engines: how a stage is run forward, backward and updated. One training step above both (`trainer.py`).

The only place, with `optim.py`, that knows of DeepSpeed and bitsandbytes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgg_fast import env
from sgg_fast.config import Config, ConfigError
from sgg_fast.train.ds_config import load_ds_config
from sgg_fast.train.optim import build_optimizer
from sgg_fast.train.stages import Terms


class Engine(Protocol):
    """What the trainer needs of an engine."""

    module: nn.Module

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Loss terms of this process's samples."""

    def update(self, total: torch.Tensor) -> None:
        """Backward, clip, optimiser step."""

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
        if env.world_size() > 1:
            raise ConfigError("several processes need DeepSpeed: add --deepspeed ds.json")
        self.module = module.to(device)
        self.optimizer = build_optimizer(module, config, stage)
        self.max_grad_norm = config.max_grad_norm
        bf16 = stage == "finetune" and resolve_precision(config, device) == "bf16"
        self._autocast = lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """See `Engine`."""
        with self._autocast():
            return self.module(ids, step)

    def update(self, total: torch.Tensor) -> None:
        """See `Engine`."""
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

    def __init__(self, module: nn.Module, config: Config, ds_path: str, device: torch.device) -> None:
        precision = resolve_precision(config, device)
        ds_config = load_ds_config(ds_path, config, precision, env.world_size())
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Without a launcher DeepSpeed would look for MPI.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29531"}
        if "RANK" not in os.environ:
            os.environ.update(alone | {k: os.environ[k] for k in ("MASTER_ADDR", "MASTER_PORT") if k in os.environ})
        import deepspeed

        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        module.to(device)
        optimizer = build_optimizer(module, config, "finetune")
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
        self.module = self.engine.module
        self.device = device

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """See `Engine`."""
        return self.engine(ids, step)

    def update(self, total: torch.Tensor) -> None:
        """See `Engine`."""
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


def build_engine(
    module: nn.Module, config: Config, stage: str, device: torch.device, ds_path: str | None
) -> PlainEngine | DeepSpeedEngine:
    """DeepSpeed where a configuration is given (fine-tuning only), the plain engine otherwise."""
    if ds_path is None:
        return PlainEngine(module, config, stage, device)
    if stage != "finetune":
        raise ConfigError("--deepspeed is for --stage finetune; pre-training fits any GPU as it is")
    return DeepSpeedEngine(module, config, ds_path, device)
