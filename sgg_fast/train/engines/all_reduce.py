"""Gradients of several processes, summed in flat buckets while backward still runs.

A hook at each weight fills the buckets in the order in which backward completes gradients; a full bucket starts its
all-reduce. On CUDA that is NCCL's, on a stream of its own, and it may be captured. On a CPU it is gloo's. The engines
divide the loss by the number of processes, so the sum is the mean.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from sgg_fast.train.optim.flat import flat_gradient
from sgg_fast.train.run import processes

BUCKET_BYTES = 32 * 2**20
"""A bucket is full at this size. A weight of this size is summed where its gradient lies, without a copy."""

ALIGNMENT = 16
"""Bytes that each gradient in a bucket is aligned to, as the optimiser reads them."""

IN_FLIGHT = 2
"""Buckets on their way at once where weights are updated in backward."""


def buckets_of(sizes: Sequence[tuple[int, torch.dtype]], order: Sequence[int], most: int) -> list[list[int]]:
    """Indices of the weights in each bucket. Buckets follow each other as backward completes them.

    sizes: (bytes, type) of each gradient; a bucket has one type. order: the weights as backward completes them.
    """
    found: list[list[int]] = []
    filling: dict[torch.dtype, list[int]] = {}
    for i in order:
        num_bytes, dtype = sizes[i]
        if num_bytes >= most:
            found.append([i])
            continue
        filling.setdefault(dtype, []).append(i)
        if sum(sizes[k][0] for k in filling[dtype]) >= most:
            found.append(filling.pop(dtype))
    return found + list(filling.values())


class GradientSum:
    """Replaces the gradients of `parameters` by their sums over the processes, once for each `expect` and `finish`.

    Backward between the two runs once. The first one has no buckets yet, because it shows the order. A weight without a
    gradient counts as zeros; where weights are updated in backward, all processes must use the same ones.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], update: Callable[[int], None] | None = None) -> None:
        """Hook the parameters. update: called with the index of each one once its gradient is summed, in backward."""
        self.parameters, self._update = list(parameters), update
        self.is_silent = False
        self._order: list[int] = []
        self._buckets: list[list[int]] | None = None
        self._expected = False
        self._arrived: set[int] = set()
        self._num_started = 0
        self._flying: list[tuple[list[int], dist.Work | None]] = []
        # As in `FlatAdam`: a hook that held its owner would keep it.
        own = weakref.ref(self)
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(_ready_by, own, i))

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Context in which everything is done but the exchange: other processes need not do the same."""
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False

    def expect(self) -> None:
        """Before the backward that completes the gradients of a step."""
        self._expected, self._num_started = True, 0
        self._arrived.clear()

    def ready(self, index: int) -> None:
        """Backward has completed the gradient of a parameter."""
        if not self._expected:
            return
        assert index not in self._arrived, "one backward for each step"
        self._arrived.add(index)
        if self._buckets is None:
            self._order.append(index)
            if self._update:  # as it must not keep all gradients
                self._start([index])
            return
        self._start_full()

    def finish(self) -> None:
        """After that backward: sum what is left and wait for all sums, on the device where they are on one."""
        if self._buckets is None:
            left = [i for i in range(len(self.parameters)) if i not in self._arrived]
            order = processes.first_says([*self._order, *left])
            sizes = [(p.nbytes, p.dtype) for p in self.parameters]
            self._buckets = buckets_of(sizes, order, BUCKET_BYTES)
            if self._update:
                for i in left:
                    self._start([i])
                self._num_started = len(self._buckets)
        self._arrived.update(range(len(self.parameters)))
        self._start_full()
        self._land(0)
        self._expected = False

    def _start_full(self) -> None:
        """Start the buckets that are full, in an order that is the same in every process."""
        assert self._buckets is not None
        while self._num_started < len(self._buckets):
            bucket = self._buckets[self._num_started]
            if not self._arrived.issuperset(bucket):
                return
            self._num_started += 1
            self._start(bucket)

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


def _ready_by(owner: weakref.ref[GradientSum], index: int, parameter: torch.Tensor) -> None:
    """Tell the owner of a hook, if it is still there."""
    found = owner()
    if found is not None:
        found.ready(index)
