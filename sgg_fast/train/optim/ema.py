"""An exponential moving average of the weights; a result holds it instead of the last weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

EVERY_ON_CPU = 16
"""Steps between updates of an average in CPU memory, because each update copies every weight off the device."""


class WeightAverage:
    """fp32 average over `tensors`; under ZeRO these are this process's parts of the fp32 master weights.

    The first updates weigh like a plain mean until the decay takes over, so the initial weights fade quickly. The decay
    at update n (from 1) is min(decay, n / (n + 9)).
    """

    def __init__(self, tensors: Sequence[torch.Tensor], decay: float, on_cpu: bool) -> None:
        self.tensors, self.decay, self.every = list(tensors), decay, EVERY_ON_CPU if on_cpu else 1
        self.averages = [t.detach().to("cpu" if on_cpu else t.device, torch.float32, copy=True) for t in self.tensors]
        self.num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Record an applied step."""
        self.num_steps += 1
        if self.num_steps % self.every:
            return
        num_updates = self.num_steps // self.every
        decay = min(self.decay**self.every, num_updates / (num_updates + 9))
        if all(a.device == t.device and a.dtype == t.dtype for a, t in zip(self.averages, self.tensors, strict=True)):
            torch._foreach_lerp_(self.averages, [tensor.detach() for tensor in self.tensors], 1 - decay)
            return
        for average, tensor in zip(self.averages, self.tensors, strict=True):
            average.lerp_(tensor.detach().to(average.device, torch.float32), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the tensors hold their averages (rounded if they are bf16)."""
        last = [tensor.detach().to("cpu", copy=True) for tensor in self.tensors]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(last)

    @torch.no_grad()
    def _write(self, values: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Number of steps and averages, in the order of the tensors."""
        return {
            "num_steps": torch.tensor(self.num_steps),
            **{str(i): t.contiguous() for i, t in enumerate(self.averages)},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load a result of `state_dict`."""
        self.num_steps = int(state["num_steps"])
        for i, average in enumerate(self.averages):
            average.copy_(state[str(i)])
