"""Buckets of weights in the order in which backward completes their gradients. A full bucket starts in backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from sgg_fast.train.run import processes


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


class InOrder:
    """Starts each bucket of `parameters` once for each `expect` and `finish`.

    Backward between the two runs once. The first one has no buckets yet, because it shows the order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], most: int) -> None:
        """Hook the parameters. most: bytes of gradients at which a bucket is full."""
        self.parameters, self._most = list(parameters), most
        self._order: list[int] = []
        self.buckets: list[list[int]] | None = None
        self._expected = False
        self._arrived: set[int] = set()
        self._num_started = 0
        # Autograd holds a hook where Python's collector does not look: a hook that held its owner would keep it.
        own = weakref.ref(self)
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(_ready_by, own, i))

    def expect(self) -> None:
        """Before the backward that completes the gradients of a step."""
        self._expected, self._num_started = True, 0
        self._arrived.clear()

    def forget(self) -> None:
        """After a backward that failed."""
        self._expected = False

    def ready(self, index: int) -> None:
        """Backward has completed the gradient of a parameter."""
        if not self._expected:
            return
        assert index not in self._arrived, "one backward for each step"
        self._arrived.add(index)
        if self.buckets is None:
            self._order.append(index)
            self._shown(index)
            return
        self._start_full()

    def form(self) -> None:
        """After the first backward: cut the buckets, alike in all processes."""
        left = [i for i in range(len(self.parameters)) if i not in self._arrived]
        order = processes.first_says([*self._order, *left])
        self.buckets = buckets_of([(p.nbytes, p.dtype) for p in self.parameters], order, self._most)
        self._formed(left)

    def finish(self) -> None:
        """After that backward: start what is left."""
        if self.buckets is None:
            self.form()
        self._arrived.update(range(len(self.parameters)))
        self._start_full()
        self._expected = False

    def _start_full(self) -> None:
        """Start the buckets that are full, in an order that is the same in every process."""
        assert self.buckets is not None
        while self._num_started < len(self.buckets):
            bucket = self.buckets[self._num_started]
            if not self._arrived.issuperset(bucket):
                return
            self._num_started += 1
            self._start(bucket)

    def _start(self, bucket: list[int]) -> None:
        """All gradients of a bucket are there; or there will be none."""
        raise NotImplementedError

    def _shown(self, index: int) -> None:
        """The first backward has completed a gradient."""

    def _formed(self, left: list[int]) -> None:
        """The buckets are known. left: the weights without a gradient in the first backward."""


def _ready_by(owner: weakref.ref[InOrder], index: int, parameter: torch.Tensor) -> None:
    """Tell the owner of a hook, if it is still there."""
    found = owner()
    if found is not None:
        found.ready(index)
