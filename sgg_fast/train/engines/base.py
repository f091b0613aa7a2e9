"""The `Engine` protocol and what engines share. An engine takes one optimiser step over some micro-batches.

`eager.py`, `captured.py` and `deepspeed.py` implement it; `choose.py` chooses between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sgg_fast.config import Config, OptimConfig
from sgg_fast.train.stages import Terms


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Losses of a step, and whether the step was applied."""

    losses: dict[str, torch.Tensor]
    """Loss terms of this process by name, "loss" first: means over the micro-batches."""
    chance: dict[str, torch.Tensor]
    """Value of each loss term at chance."""
    applied: bool
    """False if a loss or gradient of any process was not finite; weights and optimiser are then unchanged.
    Where weights are updated in or behind backward, only those updated together with such a gradient are unchanged."""
    behind: int = 0
    """Age in steps of the step that `applied` describes: the host does not always wait for the device."""
    lost: float | None = None
    """Loss of that step, if it was skipped and `losses` belong to another step."""
    grad_norm: torch.Tensor | None = None
    """Norm of all gradients before clipping, scalar; None if no moment has them all. Holds until the next step."""


class Engine(Protocol):
    """Runs a stage forward and backward and updates its weights."""

    module: Any
    """The stage, possibly in a wrapper."""
    execution: str
    """How steps run, as text: captured, or eager with the reason."""
    sharded: bool
    """True if no process holds whole weights between steps (ZeRO-3); every process must then make the same calls."""

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> StepResult:
        """Take one optimiser step on the mean loss of this process's micro-batches [K, B] of sample ids.

        lr_factor: share of the learning rates. A loss or gradient with NaN or Inf raises nothing; it sets
        `StepResult.applied` to False.
        """

    def outstanding(self) -> list[tuple[int, float]]:
        """Skipped steps not yet reported, with their losses; waits for the device."""

    def save(self, folder: Path) -> None:
        """Write weights and optimiser into `folder`; every process calls it."""

    def load(self, folder: Path) -> None:
        """Load a folder that `save` wrote."""

    def exported(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the first process's `module` holds the weights of a result; every process enters it."""


@contextlib.contextmanager
def holding(values: Mapping[torch.nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Context in which these parameters hold other tensors."""
    held = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in held.items():
            parameter.data = value


def run_micro_batches(
    ids_KB: np.ndarray, step: int, forward: Callable[[np.ndarray, int], Terms], backward: Callable[[torch.Tensor], None]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run forward and backward for each micro-batch's share of the loss; returns mean terms and values at chance."""
    micro = []
    for ids in ids_KB:
        terms = forward(ids, step)
        backward(terms.total / len(ids_KB))
        micro.append((terms.losses, terms.chance))
    losses, chance = (
        {name: torch.stack([one[side][name] for one in micro]).mean(0) for name in micro[0][side]} for side in (0, 1)
    )
    return losses, chance


def resolve_precision(optim: OptimConfig, device: torch.device) -> str:
    """Resolve the precision to "bf16", "fp16" or "fp32".

    "auto" is bf16 on CUDA and for bf16 weights. It is fp32 on CPU, where bf16 is slower.
    """
    if optim.precision != "auto":
        return optim.precision
    return "bf16" if device.type == "cuda" or optim.bf16_weights else "fp32"


def resolve_matmul(optim: OptimConfig, stage: str, device: torch.device) -> str:
    """torch's float32 matmul precision of a step, "" for what the process has: only pre-training on CUDA sets it.

    Fine-tuning multiplies in bf16. On a CPU the same setting would multiply in bf16, not in TF32.
    """
    return optim.pretrain_matmul if stage == "pretrain" and device.type == "cuda" else ""


def resolve_weights(optim: OptimConfig, device: torch.device, has_kernels: bool, by_deepspeed: bool) -> str:
    """Resolve the storage of the UNet's weights to "master", "split" or "lean".

    "auto" is "split" where our kernels update the whole UNet on CUDA after bf16 compute. An average of the weights
    reads fp32 numbers, so it keeps "master".
    """
    if optim.weights != "auto":
        return optim.weights
    ours = device.type == "cuda" and has_kernels and not by_deepspeed
    whole = not optim.lora and not optim.ema and resolve_precision(optim, device) == "bf16"
    return "split" if ours and whole else "master"


def resolved(config: Config, stage: str, device: torch.device, has_kernels: bool, by_deepspeed: bool) -> Config:
    """The settings with `resolve_weights`' word in place of "auto". Pre-training has no such weights and keeps it."""
    if stage == "pretrain" or config.optim.weights != "auto":
        return config
    return config.replace(weights=resolve_weights(config.optim, device, has_kernels, by_deepspeed))
