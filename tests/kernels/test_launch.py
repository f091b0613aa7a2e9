"""Launches: who sees and replaces them, on which device, and what floats and empty grids become."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from sgg_kernels.launch import intercept, launch
from torch._subclasses.fake_tensor import FakeTensorMode


@triton.jit
def rest_kernel(p_out, beta):
    """What is left of 1 once beta has been rounded."""
    tl.store(p_out, 1 - beta)


def test_arithmetic_on_an_argument_is_fp32(device):
    out = torch.empty(1, device=device)
    launch(rest_kernel, (1,), out, 0.999)
    assert out.item() == np.float32(1) - np.float32(0.999) != np.float32(1 - 0.999)


class Kernel:
    """Stands for a kernel; remembers each launch, and what `state` gave then."""

    def __init__(self, state: Callable[[], int] = int) -> None:
        self.state, self.states = state, []
        self.calls: list[tuple] = []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.states.append(self.state())
            self.calls.append((grid, args, options))

        return run


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever device the pointers belong to."""
    current = [0]
    kernel = Kernel(lambda: current[0])

    @contextlib.contextmanager
    def device(chosen):
        before, current[0] = current[0], torch.device(chosen).index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    with FakeTensorMode():
        tensors = [torch.empty(2, device=f"cuda:{i}") for i in (0, 1)]
    for x in tensors:
        launch(kernel, (1,), x, 3)
    assert kernel.states == [0, 1] and current == [0]


def test_an_interceptor_sees_every_launch_and_may_replace_it():
    kernel, seen = Kernel(), []

    def second_is_mine(*launched) -> bool:
        seen.append(launched)
        return len(seen) == 2

    with intercept(second_is_mine):
        for num in (1, 2, 3):
            launch(kernel, (num,), "x", BLOCK=16)
        with pytest.raises(AssertionError, match="intercepted already"), intercept(second_is_mine):
            pass
    launch(kernel, (4,), "x", BLOCK=16)
    options = {"enable_fp_fusion": True, "BLOCK": 16}
    assert seen == [(kernel, (num,), ("x",), options) for num in (1, 2, 3)]
    assert kernel.calls == [((num,), ("x",), options) for num in (1, 3, 4)]


def test_an_interceptor_is_gone_after_an_error():
    with pytest.raises(KeyError), intercept(lambda *_: True):
        raise KeyError
    kernel = Kernel()
    launch(kernel, (1,))
    assert len(kernel.calls) == 1


def test_an_empty_grid_launches_nothing():
    kernel, seen = Kernel(), []
    with intercept(lambda *launched: bool(seen.append(launched))):
        launch(kernel, (3, 0), "x")
    assert not seen and not kernel.calls


def test_a_caller_may_turn_fusion_off():
    kernel = Kernel()
    launch(kernel, (1,), enable_fp_fusion=False)
    assert kernel.calls == [((1,), (), {"enable_fp_fusion": False})]
