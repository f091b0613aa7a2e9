"""What every engine does: one optimiser step over some micro-batches (`Engine.update`).

`plain.py` and `ds_engine.py` say how a gradient is made and applied; `engine.py` chooses between them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sgg_fast.config import Config
from sgg_fast.train.optim.ema import WeightAverage
from sgg_fast.train.optim.groups import set_lr
from sgg_fast.train.stages import Terms


@dataclasses.dataclass(frozen=True)
class Update:
    """What a step computed, and whether it changed anything."""

    values: dict[str, torch.Tensor]
    """Loss terms of this process by name, "loss" first: means over the micro-batches."""
    chance: dict[str, torch.Tensor]
    """What each of them is at chance."""
    applied: bool
    """False where a loss or gradient of any process was not finite: weights and optimiser are then as before."""
    behind: int = 0
    """How many steps ago the step was that `applied` tells of, where the host does not wait for the device."""
    lost: float | None = None
    """The loss of that step if it was not applied, where `values` are not its own."""


class Engine(abc.ABC):
    """Runs a stage forward and backward and updates its weights."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    execution = "eager"
    """How steps run, for people: captured, or eagerly and why."""
    sharded = False
    """Whether no process holds whole weights between steps: then every process must run what one runs (ZeRO-3)."""

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> Update:
        """One optimiser step on the mean loss of this process's micro-batches [K, B] of sample ids.

        lr_factor: share of the learning rates. Raises nothing for numbers that are not finite: see `Update.applied`.
        """
        set_lr(self.optimizer, lr_factor)
        micro = []
        for ids in ids_KB:
            terms = self.forward(ids, step)
            self._backward(terms.total / len(ids_KB))
            micro.append((terms.values, terms.chance))
        applied = self._apply()
        if applied and self.average:
            self.average.update()
        values, chance = (
            {name: torch.stack([one[side][name] for one in micro]).mean(0) for name in micro[0][side]}
            for side in (0, 1)
        )
        return Update(values, chance, applied)

    def outstanding(self) -> list[tuple[int, float]]:
        """Steps not applied that no `Update` has told of yet, with their losses; waits for all of them."""
        return []

    @abc.abstractmethod
    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Loss terms of this process's samples [B]."""

    @abc.abstractmethod
    def _backward(self, total: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""

    @abc.abstractmethod
    def _apply(self) -> bool:
        """Clip and step, unless something was not finite on any process; returns whether it was applied."""

    @abc.abstractmethod
    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over processes of a vector."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Wait for every process."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimiser into `folder`; every process calls it."""

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Inside, the first process's `module` holds the weights that a result is made of; every process enters it."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            yield


def resolve_precision(config: Config, device: torch.device) -> str:
    """ "bf16", "fp16" or "fp32". Auto is bf16 on CUDA and for bf16 weights, fp32 on CPU, where bf16 is slower."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" or config.bf16_weights else "fp32"
