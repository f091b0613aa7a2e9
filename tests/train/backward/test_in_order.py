"""Buckets of weights in the order of backward, started while it goes on."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from sgg_fast.train.backward.in_order import InOrder, buckets_of

FP32, BF16 = torch.float32, torch.bfloat16


def test_buckets_fill_in_the_order_of_backward_one_type_each():
    sizes = [(4, FP32), (4, FP32), (2, BF16), (90, FP32), (2, BF16), (4, FP32)]
    assert buckets_of(sizes, [5, 4, 3, 2, 1, 0], 8) == [[3], [5, 1], [4, 2], [0]]
    assert buckets_of(sizes, [0, 1, 2, 3, 4, 5], 8) == [[0, 1], [3], [2, 4], [5]]
    assert buckets_of(sizes, range(6), 1000) == [[0, 1, 3, 5], [2, 4]]


class Started(InOrder):
    """Keeps what backward has done by the time that each bucket starts."""

    def __init__(self, parameters: list[nn.Parameter], most: int) -> None:
        super().__init__(parameters, most)
        self.seen: list[tuple[list[int], set[int]]] = []
        self.left: list[int] | None = None

    def _start(self, bucket: list[int]) -> None:
        self.seen.append((bucket, set(self._arrived)))

    def _formed(self, left: list[int]) -> None:
        self.left = left


def step(net: nn.Sequential, unused: nn.Parameter | None, starts: Started) -> list[tuple[list[int], set[int]]]:
    """Backward of a step; the weight that is not always used is added to the output."""
    starts.seen.clear()
    starts.expect()
    y = net(torch.ones(1, 4)).sum()
    (y if unused is None else y + unused.sum()).backward()
    starts.finish()
    net.zero_grad()
    return [(bucket, arrived) for bucket, arrived in starts.seen]


def test_buckets_start_in_the_order_that_the_first_backward_showed():
    """Two layers to a bucket, the last layer's first, as soon as it is full; one without gradients starts last."""
    net, sometimes = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))), nn.Parameter(torch.ones(16))
    starts = Started([*net.parameters(), sometimes], most=100)
    first = step(net, None, starts)
    assert [bucket for bucket, _ in first] == starts.buckets == [[2, 1], [0, 3]] and starts.left == [3]
    everything = {0, 1, 2, 3}
    assert all(arrived == everything for _, arrived in first), "the first backward shows the order only"
    assert step(net, None, starts) == [([2, 1], {1, 2}), ([0, 3], everything)]
    assert [bucket for bucket, _ in step(net, sometimes, starts)] == starts.buckets


def test_backward_outside_of_a_step_starts_nothing_and_one_that_failed_is_forgotten():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    starts = Started(list(net.parameters()), most=64)
    step(net, None, starts)
    starts.seen.clear()
    net(torch.ones(1, 4)).sum().backward()
    assert starts.seen == []
    starts.expect()
    starts.forget()
    net(torch.ones(1, 4)).sum().backward()
    assert starts.seen == []
    assert [bucket for bucket, _ in step(net, None, starts)] == [[1], [0]]
    starts.expect()
    net(torch.ones(1, 4)).sum().backward()
    with pytest.raises(AssertionError, match="one backward for each step"):
        net(torch.ones(1, 4)).sum().backward()


def test_hooks_keep_no_owner():
    net = nn.Linear(4, 4)
    starts = Started(list(net.parameters()), most=64)
    seen = starts.seen
    starts.expect()
    del starts
    gc.collect()
    net(torch.ones(1, 4)).sum().backward()
    assert net.weight.grad is not None and seen == []
