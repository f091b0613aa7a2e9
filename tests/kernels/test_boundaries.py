"""The graph kernels where index arithmetic and autograd go wrong: chunk borders, and what of an op is used.

Each case of `RUNS` is what a chunk can meet; `test_drawn_graphs_cut_into_tiny_chunks` draws what nobody thought of.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from sgg_kernels import launch, masked_pool, role_sums, scatter_mean, segments
from support.cases.graph import BATCHES, OPS, Tensors, assert_within_rule, batch_of, call, evaluate, inputs_of
from torch._subclasses.fake_tensor import FakeTensorMode

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch

CHUNK = 4

RUNS: dict[str, list[tuple[int, int]]] = {
    "start_at_a_chunk": [(4, 4), (4, 4)],
    "exactly_k_chunks": [(8, 4), (4, 8)],
    "one_row_short": [(3, 4), (7, 7), (1, 0)],
    "one_row_long": [(5, 4), (4, 5)],
    "role_changes_in_a_chunk": [(2, 2), (6, 6), (2, 2)],
    "role_changes_at_a_chunk": [(4, 8), (8, 4)],
    "adjacent_hubs": [(12, 12), (12, 12)],
    "empty_rows_at_a_border": [(4, 0), (0, 0), (0, 4), (0, 0), (4, 4)],
    "empty_ends": [(0, 0), (5, 5), (0, 0)],
    "all_one_object": [(13, 13)],
    "last_chunk_is_partial": [(1, 0), (0, 1), (4, 0), (0, 4), (1, 1)],
    "more_partials_than_a_block": [(60, 0), (0, 60), (1, 1)],
}
"""By what a chunk of CHUNK messages meets: how many relations each object is subject and object of."""


def batch_of_runs(runs: list[tuple[int, int]]) -> SceneGraphBatch:
    """One graph; the first object's relations go to the last objects first."""
    subject, object_ = (np.repeat(np.arange(len(runs)), [run[role] for run in runs]) for role in (0, 1))
    return batch_of(subject, object_[::-1].copy(), [(len(runs), len(subject))])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("op", OPS)
def test_runs_against_chunk_borders(op, name, device, poisoned, monkeypatch):
    for module in (role_sums, scatter_mean, masked_pool):
        monkeypatch.setattr(module, "chunk_size", lambda num_rows: CHUNK)
    batch = batch_of_runs(RUNS[name]).to(device)
    inputs = {k: x.to(device) for k, x in inputs_of(op, batch, 3).items()}
    exact = evaluate("reference", op, {k: x.double() for k, x in inputs.items()}, batch)
    assert_within_rule(evaluate("triton", op, inputs, batch), evaluate("reference", op, inputs, batch), exact)


@pytest.mark.parametrize("op", OPS)
def test_arguments_of_value_one(op, device, poisoned):
    """One object, one relation, one graph, width 1: Triton compiles every such argument in as a constant."""
    batch = batch_of(np.zeros(1, np.int64), np.zeros(1, np.int64), [(1, 1)]).to(device)
    inputs = {k: x.to(device) for k, x in inputs_of(op, batch, 1).items()}
    exact = evaluate("reference", op, {k: x.double() for k, x in inputs.items()}, batch)
    assert_within_rule(evaluate("triton", op, inputs, batch), evaluate("reference", op, inputs, batch), exact)


def gradients(backend: str, op: str, inputs: Tensors, wanted: list[str], outputs: slice = slice(None)) -> Tensors:
    """Gradients of the `wanted` inputs alone, 0 where there is none, from some of the outputs."""
    batch = BATCHES["unsorted"]().to(next(iter(inputs.values())).device)
    ops.use_kernels(backend)
    try:
        leaves = {k: x.detach().requires_grad_(k in wanted) for k, x in inputs.items()}
        sum(out.float().square().sum() for out in call(op, leaves, batch)[outputs]).backward()
    finally:
        ops.use_kernels("auto")
    assert all(leaves[k].grad is None for k in inputs if k not in wanted)
    return {k: torch.zeros_like(leaves[k]) if leaves[k].grad is None else leaves[k].grad for k in wanted}


@pytest.mark.parametrize("op", OPS)
def test_frozen_inputs(op, device, poisoned):
    """Each input alone takes a gradient."""
    inputs = {k: x.to(device) for k, x in inputs_of(op, BATCHES["unsorted"](), 7).items()}
    for name in inputs:
        found, want = (gradients(backend, op, inputs, [name]) for backend in ("triton", "reference"))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2)], ids=["mean", "relations"])
@pytest.mark.parametrize("op", ["scatter_mean", "scatter_mean_residual"])
def test_an_output_that_nobody_uses(op, used, device, poisoned):
    inputs = {k: x.to(device) for k, x in inputs_of(op, BATCHES["unsorted"](), 7).items()}
    found, want = (gradients(backend, op, inputs, list(inputs), used) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("op", OPS)
def test_every_input_in_a_dtype_of_its_own(op, shift, device, poisoned):
    """Gradients come in the dtype of their input, whatever the others are in."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    plain = inputs_of(op, BATCHES["unsorted"](), 7)
    inputs = {k: x.to(device, dtypes[(i + shift) % 3]) for i, (k, x) in enumerate(plain.items())}
    found, want = (gradients(backend, op, inputs, list(inputs)) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=4e-2, atol=6e-2)


def test_one_tensor_in_two_roles(device, poisoned):
    """`--triple shared` passes s and o as the same tensor."""
    found = []
    for backend in ops.BACKENDS:
        batch = BATCHES["unsorted"]().to(device)
        inputs = {k: x.to(device) for k, x in inputs_of("triple_context", batch, 7).items()}
        ops.use_kernels(backend)
        both = inputs["s"].requires_grad_()
        call("triple_context", inputs | {"o": both}, batch)[0].square().sum().backward()
        ops.use_kernels("auto")
        found.append(both.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


class Kernel:
    """Stands for a kernel; remembers the device that was current when it was launched."""

    def __init__(self) -> None:
        self.devices: list[int] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.devices.append(torch.cuda.current_device())


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever device the pointers belong to."""
    current, kernel = [0], Kernel()

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
        launch.launch(kernel, (1,), x, 3)
    assert kernel.devices == [0, 1] and current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_another_device_than_the_current(op):
    batch = BATCHES["unsorted"]().to("cuda:1")
    inputs = {k: x.to("cuda:1") for k, x in inputs_of(op, batch, 33).items()}
    with torch.cuda.device(0):
        found, want = (evaluate(backend, op, inputs, batch) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_rows_are_few_where_their_width_rules_wide_loads_out():
    """Triton proves alignment from multiples of 16 only: at D = 120 sixteen rows at a time spilled 56 bytes."""
    blocks = {d: segments.run_options(60, d, 2, fp32_residual=True)["BLOCK_M"] for d in (112, 120, 128, 77)}
    assert blocks[112] == blocks[128] == 8 and blocks[120] == blocks[77] == 2
