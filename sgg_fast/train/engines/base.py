"""What every engine does: one optimiser step over some micro-batches (`Engine.update`), and what engines share.

`eager.py`, `captured.py` and `deepspeed.py` say how a gradient is made and applied; `choose.py` chooses between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sgg_fast.config import OptimConfig
from sgg_fast.train.stages import Terms


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step computed, and whether it changed anything."""

    losses: dict[str, torch.Tensor]
    """Loss terms of this process by name, "loss" first: means over the micro-batches."""
    chance: dict[str, torch.Tensor]
    """What each of them is at chance."""
    applied: bool
    """False where a loss or gradient of any process was not finite: weights and optimiser are then as before."""
    behind: int = 0
    """Age in steps of the step that `applied` describes, where the host does not wait for the device."""
    lost: float | None = None
    """Loss of that step if it was not applied and `losses` are not its own."""


class Engine(Protocol):
    """Runs a stage forward and backward and updates its weights."""

    module: Any
    """The stage, perhaps in a wrapper."""
    execution: str
    """How steps run, for people: captured, or eagerly and why."""
    sharded: bool
    """Whether no process holds whole weights between steps: then every process must run what one runs (ZeRO-3)."""

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> StepResult:
        """One optimiser step on the mean loss of this process's micro-batches [K, B] of sample ids.

        lr_factor: share of the learning rates. Raises nothing for numbers that are not finite: see
        `StepResult.applied`.
        """

    def outstanding(self) -> list[tuple[int, float]]:
        """Skipped steps not yet reported, with their losses; waits for the device."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over processes of a vector."""

    def barrier(self) -> None:
        """Wait for every process."""

    def save(self, folder: Path) -> None:
        """Write weights and optimiser into `folder`; every process calls it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def exported(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the first process's `module` holds the weights of a result; every process enters it."""


def run_micro_batches(
    ids_KB: np.ndarray, step: int, forward: Callable[[np.ndarray, int], Terms], backward: Callable[[torch.Tensor], None]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Forward and backward of each micro-batch's share of the loss; the terms' means, and what they are at chance."""
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
    """ "bf16", "fp16" or "fp32". Auto is bf16 on CUDA and for bf16 weights, fp32 on CPU, where bf16 is slower."""
    if optim.precision != "auto":
        return optim.precision
    return "bf16" if device.type == "cuda" or optim.bf16_weights else "fp32"
