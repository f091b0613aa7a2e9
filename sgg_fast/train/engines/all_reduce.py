"""Gradients of several processes, summed in flat buckets while backward still runs.

A hook at each weight fills the buckets in the order in which backward completes gradients; a full bucket starts its
all-reduce. On CUDA that is NCCL's, on a stream of its own, and it may be captured. On a CPU it is gloo's. The engines
divide the loss by the number of processes, so the sum is the mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from sgg_fast.train.backward.in_order import InOrder
from sgg_fast.train.optim.flat import flat_gradient

BUCKET_BYTES = 32 * 2**20
"""A bucket is full at this size. A weight of this size is summed where its gradient lies, without a copy."""

ALIGNMENT = 16
"""Bytes that each gradient in a bucket is aligned to, as the optimiser reads them."""

IN_FLIGHT = 2
"""Buckets on their way at once where weights are updated in backward."""


class GradientSum(InOrder):
    """Replaces the gradients of `parameters` by their sums over the processes.

    A weight without a gradient counts as zeros; where weights are updated in backward, all processes must use the same
    ones.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], update: Callable[[int], None] | None = None) -> None:
        """Hook the parameters. update: called with the index of each one once its gradient is summed, in backward."""
        super().__init__(parameters, BUCKET_BYTES)
        self._update, self.is_silent = update, False
        self._flying: list[tuple[list[int], dist.Work | None]] = []

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Context in which everything is done but the exchange: other processes need not do the same."""
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False

    def finish(self) -> None:
        """After that backward: sum what is left and wait for all sums, on the device where they are on one."""
        super().finish()
        self._land(0)

    def _shown(self, index: int) -> None:
        if self._update:  # as it must not keep all gradients
            self._start([index])

    def _formed(self, left: list[int]) -> None:
        if self._update:
            assert self.buckets is not None
            for i in left:
                self._start([i])
            self._num_started = len(self.buckets)

    @torch.no_grad()
    def _start(self, bucket: list[int]) -> None:
        """Lay the gradients of a bucket end to end and start their sum."""
        weights = [self.parameters[i] for i in bucket]
        flat = self._alone(weights[0]) if len(weights) == 1 else self._together(weights)
        work = None if self.is_silent else dist.all_reduce(flat, async_op=True)
        self._flying.append((bucket, work))
        if self._update:
            self._land(IN_FLIGHT - 1)

    def _alone(self, weight: nn.Parameter) -> torch.Tensor:
        """The gradient of a single weight, flat; it becomes its own bucket."""
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        flat = flat_gradient(weight)
        weight.grad = flat.as_strided(weight.shape, weight.stride(), flat.storage_offset())
        return flat

    def _together(self, weights: list[nn.Parameter]) -> torch.Tensor:
        """The gradients of several weights in one new tensor, of which they become views."""
        step = ALIGNMENT // weights[0].element_size()
        offsets, end = [], 0
        for weight in weights:
            offsets.append(end)
            end += -(-weight.numel() // step) * step
        flat = torch.empty(end, dtype=weights[0].dtype, device=weights[0].device)
        places = [flat.as_strided(w.shape, w.stride(), offset) for w, offset in zip(weights, offsets, strict=True)]
        held = [(place, w.grad) for place, w in zip(places, weights, strict=True) if w.grad is not None]
        if held:
            torch._foreach_copy_([place for place, _ in held], [grad for _, grad in held])
        for weight, place in zip(weights, places, strict=True):
            if weight.grad is None:
                place.zero_()
            weight.grad = place
        return flat

    def _land(self, most: int) -> None:
        """Wait for sums until at most so many are on their way."""
        while len(self._flying) > most:
            bucket, work = self._flying.pop(0)
            if work is not None:
                work.wait()
            if self._update:
                for i in bucket:
                    self._update(i)
