"""Checks that every graph kernel passes: values and all gradients against the pure-torch form, and promises beside.

A test file of tests/kernels imports them by name and lists its operators in CHECKED; tests/kernels/conftest.py fills in
`op` and `plain_op`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sgg_kernels import launch, masked_pool, role_sums, scatter_mean

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch
from support.cases.graph import (
    BATCHES,
    assert_within_rule,
    batch_of,
    call,
    compare,
    evaluate,
    inputs_of,
    random_batch,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in BATCHES if name != "hub"])
def test_values_and_gradients(op, name, dtype, device, poisoned):
    compare(op, BATCHES[name](), 33, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hub(plain_op, dtype, device, poisoned):
    """The interpreter needs seconds for a hub."""
    compare(plain_op, BATCHES["hub"](), 8, dtype, device)


@pytest.mark.parametrize("width", [1, 130, 16])
def test_odd_and_aligned_widths(op, width, device, poisoned):
    """A multiple of 16 takes blocks of 16 rows behind a run's first, smaller one."""
    compare(op, BATCHES["unsorted"](), width, torch.bfloat16, device)


def test_arguments_of_value_one(op, device, poisoned):
    """One object, one relation, one graph, width 1: Triton compiles every such argument in as a constant."""
    compare(op, batch_of(np.zeros(1, np.int64), np.zeros(1, np.int64), [(1, 1)]), 1, torch.float32, device)


def column_view(x: torch.Tensor) -> torch.Tensor:
    """The same values with another row stride and first address."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, columns first in memory."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


@pytest.mark.parametrize("view", [column_view, transposed])
def test_non_contiguous_inputs(op, view, device, poisoned):
    compare(op, BATCHES["unsorted"](), 33, torch.float32, device, view)


def test_expanded_gradients(op, device, poisoned):
    """`sum().backward()` hands in gradients of stride 0."""
    batch = BATCHES["unsorted"]().to(device)
    found = {}
    for backend in ops.BACKENDS:
        ops.use_kernels(backend)
        leaves = {k: x.to(device).requires_grad_() for k, x in inputs_of(op, batch, 7).items()}
        sum(out.sum() for out in call(op, leaves, batch)).backward()
        found[backend] = [leaf.grad for leaf in leaves.values()]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_same_bits_twice(op, device):
    for name in ("scenes",) if op == "scatter_mean_residual" else ("scenes", "hub"):
        batch = BATCHES[name]().to(device)
        inputs = {k: x.to(device) for k, x in inputs_of(op, batch, 8).items()}
        first, again = (evaluate("triton", op, inputs, batch) for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, again[key]), (name, key)


def test_a_graph_does_not_see_its_neighbours(op, device):
    """Padding is one more graph: with NaN in all its rows, the others keep their bits, gradients included."""
    sizes, rng = [(4, 9), (3, 5), (6, 20)], np.random.default_rng(7)
    ends = np.concatenate([rng.integers(0, 4, (2, 9)), rng.integers(4, 7, (2, 5)), rng.integers(7, 13, (2, 20))], 1)
    both = batch_of(*ends, sizes).to(device)
    alone = batch_of(*ends[:, :14], sizes[:2]).to(device)
    for field in ("object_pooled", "relation_pooled"):
        getattr(alone, field).copy_(getattr(both, field)[: len(getattr(alone, field))])
    full = {k: x.to(device) for k, x in inputs_of(op, both, 17).items()}
    bounds = {both.num_objects: 7, both.num_relations: 14, both.num_graphs: 2}
    parts = {k: x if k == "bias" else x[: bounds[len(x)]] for k, x in full.items()}
    poisoned_inputs = {}
    for k, x in full.items():
        poisoned_inputs[k] = x if k == "bias" else torch.cat([parts[k], torch.full_like(x[len(parts[k]) :], torch.nan)])
    found, expected = evaluate("triton", op, poisoned_inputs, both), evaluate("triton", op, parts, alone)
    for key, value in found.items():
        if key == "grad bias":
            continue
        kept = value[: bounds[len(value)]]
        if key.startswith("grad"):  # cotangents of another shape are other numbers: only finiteness is comparable
            assert kept.isfinite().all(), key
        else:
            assert torch.equal(kept, expected[key]), key


def test_nan_comes_through(op, device):
    """A kernel that swallowed NaN would hide a diverged run."""
    batch = BATCHES["scenes"]().to(device)
    inputs = {k: x.to(device) for k, x in inputs_of(op, batch, 5).items()}
    for name in {"b", "y", "x", "r", "rows"} & inputs.keys():
        spoiled = inputs | {name: inputs[name].clone()}
        spoiled[name][0] = torch.nan
        assert evaluate("triton", op, spoiled, batch)["out0"].isnan().any(), name


def cut_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Split runs at multiples of `chunk` rows, whatever the number of rows."""
    for module in (role_sums, scatter_mean, masked_pool):
        monkeypatch.setattr(module, "chunk_size", lambda num_rows: chunk)


def launches_of(op: str, device: str) -> tuple[list[str], list[str]]:
    """Names of the kernels that run forward and backward, without the ending `_kernel`."""
    batch = BATCHES["scenes"]().to(device)
    inputs = {k: x.to(device).requires_grad_() for k, x in inputs_of(op, batch, 8).items()}
    seen: list[str] = []
    with launch.intercept(lambda kernel, *_: seen.append(kernel.__name__.removesuffix("_kernel")) or False):
        ops.use_kernels("triton")
        outputs = call(op, inputs, batch)
        forward = seen.copy()
        torch.autograd.grad(sum(out.sum() for out in outputs), list(inputs.values()))
    return forward, seen[len(forward) :]


RUN = 100
"""Relations of each object, all of them loops, and each object is a graph of its own."""


def loops(num_objects: int, device: str) -> SceneGraphBatch:
    """A batch in closed form, so that the end of a huge one can be computed alone."""
    num_relations = num_objects * RUN
    end_E = torch.arange(num_relations, dtype=torch.int32, device=device) // RUN
    object_N = torch.arange(num_objects, dtype=torch.int32, device=device)
    ptr_N1 = torch.arange(num_objects + 1, dtype=torch.int32, device=device)
    slot_NR = torch.arange(num_relations, dtype=torch.int32, device=device).view(num_objects, RUN)
    sizes = np.tile([1, RUN], (num_objects, 1))
    return SceneGraphBatch(
        object_name=object_N, predicate_name=end_E, phrase=end_E, subject=end_E, object=end_E, object_ptr=ptr_N1,
        relation_ptr=ptr_N1 * RUN, message_ptr=ptr_N1 * (2 * RUN), message_mid=object_N * (2 * RUN) + RUN,
        message_slot=slot_NR.repeat(1, 2).flatten(), object_graph=object_N, relation_graph=end_E,
        object_pooled=torch.ones_like(object_N, dtype=torch.uint8),
        relation_pooled=(end_E % 2 == 0).to(torch.uint8), sizes=sizes,
    )  # fmt: skip


LARGE = {"gather_add_relu": 1800, "scatter_mean": 700, "masked_pool": 1800, "graph_mean": 1800, "triple_context": 1800}
"""Width such that 12 000 objects' relations have more than 2^31 elements (3D of them in scatter_mean)."""


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("device", "num_objects", "width"),
    [
        pytest.param("cpu", 6, 8, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="runs at full size")),
        pytest.param("cuda", 12_000, None, marks=pytest.mark.gpu),
    ],
)
def test_more_than_2_31_elements(plain_op, device, num_objects, width):
    """The last rows of a tensor of more than 2^31 elements, forward and backward, equal those computed alone."""
    width, tail = width or LARGE[plain_op], 3
    whole, alone = loops(num_objects, device), loops(tail, device)
    alone = dataclasses.replace(alone, relation_pooled=whole.relation_pooled[-tail * RUN :])
    small = {k: x.to(device) for k, x in inputs_of(plain_op, alone, width, torch.bfloat16).items()}
    rows = {tail: num_objects, tail * RUN: num_objects * RUN}
    large = {}
    for name, x in small.items():
        large[name] = x.new_zeros(rows[len(x)], *x.shape[1:]) if name != "bias" else x
        large[name][-len(x) :] = x
    assert device == "cpu" or max(x.numel() for x in large.values()) > 2**31

    found = {}
    for name, inputs, batch in (("whole", large, whole), ("alone", small, alone)):
        ops.use_kernels("triton" if name == "whole" else "reference")
        leaves = {k: x.requires_grad_() for k, x in inputs.items()}
        outputs = call(plain_op, leaves, batch)
        (
            sum(out[-len(out) * tail // num_objects if name == "whole" else 0 :].float().sum() for out in outputs)
        ).backward()
        found[name] = [*outputs, *(x.grad for k, x in leaves.items() if k != "bias")]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one[-len(other) :], other, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(op):
    """Forward and backward replay on new values: no host synchronisation, no host-side decision on data."""
    batch = random_batch([(9, 40), (30, 700)], seed=1).to("cuda")
    inputs = {k: x.to("cuda").requires_grad_() for k, x in inputs_of(op, batch, 64).items()}

    def step() -> list[torch.Tensor]:
        outputs = call(op, inputs, batch)
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), list(inputs.values()))]

    ops.use_kernels("triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs.values():
            x.mul_(0.5)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_many_programs(op):
    """Sizes that fill the card: wide blocks, split runs, several rows a program."""
    batch = random_batch([(3000, 20_000), (1, 2000), (2000, 5000)], seed=2).to("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {k: x.to("cuda") for k, x in inputs_of(op, batch, 520, dtype).items()}
        low, found = (evaluate(backend, op, inputs, batch) for backend in ("reference", "triton"))
        exact = evaluate("reference", op, {k: x.double() for k, x in inputs.items()}, batch)
        assert_within_rule(found, low, exact)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current(op):
    batch = BATCHES["unsorted"]().to("cuda:1")
    inputs = {k: x.to("cuda:1") for k, x in inputs_of(op, batch, 33).items()}
    with torch.cuda.device(0):
        found, want = (evaluate(backend, op, inputs, batch) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
