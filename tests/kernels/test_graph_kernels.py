"""The graph kernels against their pure-torch form: values, all gradients, and what else they promise."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sgg_kernels import launch, masked_pool, role_sums, scatter_mean, segments
from support.cases.graph import BATCHES, OPS, assert_within_rule, batch_of, call, evaluate, inputs_of

from sgg_fast import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN_OPS = tuple(op for op in OPS if op != "scatter_mean_residual")
"""Without the variant that takes the same path: the interpreter needs seconds for a hub."""


def compare(op: str, batch, width: int, dtype: torch.dtype, device: str = "cpu", view=lambda x: x) -> None:
    """The Triton form of `op` against the reference, by the tolerance rule; `view` lays the inputs out."""
    batch = batch.to(device)
    inputs = {name: x.to(device) for name, x in inputs_of(op, batch, width, dtype).items()}
    found = evaluate("triton", op, {name: view(x) for name, x in inputs.items()}, batch)
    low = evaluate("reference", op, inputs, batch)
    exact = evaluate("reference", op, {name: x.double() for name, x in inputs.items()}, batch)
    assert_within_rule(found, low, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in BATCHES if name != "hub"])
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(op, name, dtype, device, poisoned):
    compare(op, BATCHES[name](), 33, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PLAIN_OPS)
def test_hub(op, dtype, device, poisoned):
    compare(op, BATCHES["hub"](), 8, dtype, device)


@pytest.mark.parametrize("width", [1, 130, 16])
@pytest.mark.parametrize("op", OPS)
def test_odd_and_aligned_widths(op, width, device, poisoned):
    """A multiple of 16 takes blocks of 16 rows behind a run's first, smaller one."""
    compare(op, BATCHES["unsorted"](), width, torch.bfloat16, device)


@pytest.mark.parametrize("op", ["gather_add_relu", "scatter_mean_residual", "triple_context"])
def test_runs_around_the_first_block(op, device, poisoned):
    """Every run length from 0 to 22, in both roles."""
    lengths = np.arange(23)
    long = np.repeat(lengths, lengths)
    other = np.zeros_like(long)
    batch = batch_of(np.concatenate([long, other]), np.concatenate([other, long]), [(23, 2 * len(long))], 0)
    compare(op, batch, 16, torch.float32, device)


def column_view(x: torch.Tensor) -> torch.Tensor:
    """The same values with another row stride and first address."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, columns first in memory."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


@pytest.mark.parametrize("view", [column_view, transposed])
@pytest.mark.parametrize("op", OPS)
def test_non_contiguous_inputs(op, view, device, poisoned):
    compare(op, BATCHES["unsorted"](), 33, torch.float32, device, view)


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradients(op, device, poisoned):
    """`sum().backward()` hands in gradients of stride 0."""
    batch = BATCHES["unsorted"]().to(device)
    found = {}
    for backend in ops.BACKENDS:
        ops.use_kernels(backend)
        leaves = {k: x.to(device).requires_grad_() for k, x in inputs_of(op, batch, 7).items()}
        sum(out.sum() for out in call(op, leaves, batch)).backward()
        found[backend] = [leaf.grad for leaf in leaves.values()]
    ops.use_kernels("auto")
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_residual_of_another_dtype(device, poisoned):
    """Under autocast the relations' stream stays fp32 while y is bf16."""
    batch = BATCHES["unsorted"]().to(device)
    low = {k: x.to(device) for k, x in inputs_of("scatter_mean_residual", batch, 33, torch.bfloat16).items()}
    mixed = {k: x if k == "y" else x.float() for k, x in low.items()}
    exact = evaluate("reference", "scatter_mean_residual", {k: x.double() for k, x in low.items()}, batch)
    found, reference = (evaluate(backend, "scatter_mean_residual", mixed, batch) for backend in ("triton", "reference"))
    assert (found["out0"].dtype, found["out1"].dtype) == (torch.bfloat16, torch.float32)
    assert_within_rule(found, reference, exact)


@pytest.mark.parametrize(("name", "op"), [*(("scenes", op) for op in OPS), *(("hub", op) for op in PLAIN_OPS)])
def test_same_bits_twice(name, op, device):
    batch = BATCHES[name]().to(device)
    inputs = {k: x.to(device) for k, x in inputs_of(op, batch, 8).items()}
    first, again = (evaluate("triton", op, inputs, batch) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("op", OPS)
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


def test_nan_comes_through(device):
    """A kernel that swallowed NaN would hide a diverged run."""
    batch = BATCHES["scenes"]().to(device)
    for op, name in (("gather_add_relu", "b"), ("scatter_mean", "y"), ("masked_pool", "x"), ("triple_context", "r")):
        inputs = {k: x.to(device) for k, x in inputs_of(op, batch, 5).items()}
        inputs[name][0] = torch.nan
        assert evaluate("triton", op, inputs, batch)["out0"].isnan().any(), op


STAGES = {
    "role_sums": ["role_sums_hub", "role_sums"],
    "scatter_mean_fwd": ["scatter_mean_fwd_hub", "scatter_mean_fwd"],
    "masked_pool_fwd": ["masked_pool_fwd_hub", "masked_pool_fwd"],
}


def cut_in_chunks(monkeypatch, chunk: int) -> None:
    """Split runs at multiples of `chunk` rows, whatever the number of rows."""
    for module in (role_sums, scatter_mean, masked_pool):
        monkeypatch.setattr(module, "chunk_size", lambda num_rows: chunk)


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("gather_add_relu", ["gather_add_relu_fwd"], ["role_sums", "column_sum"]),
        ("scatter_mean", ["scatter_mean_fwd"], ["scatter_mean_bwd", "column_sum"]),
        ("masked_pool", ["masked_pool_fwd"], ["masked_pool_bwd"]),
        ("graph_mean", ["masked_pool_fwd"], ["masked_pool_bwd"]),
        ("triple_context", ["triple_context_fwd"], ["role_sums", "masked_pool_fwd", "column_sum"]),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_launches(op, forward, backward, split, device, monkeypatch):
    """Exactly these kernels run, and where runs are split the first stage before each sum over runs."""
    batch = BATCHES["scenes"]().to(device)
    inputs = {k: x.to(device).requires_grad_() for k, x in inputs_of(op, batch, 8).items()}
    if split:
        cut_in_chunks(monkeypatch, 4)
        forward, backward = ([k for x in names for k in STAGES.get(x, [x])] for names in (forward, backward))
    seen: list[str] = []
    with launch.intercept(lambda kernel, *_: seen.append(kernel.__name__.removesuffix("_kernel")) or False):
        ops.use_kernels("triton")
        outputs = call(op, inputs, batch)
        assert seen == forward
        torch.autograd.grad(sum(out.sum() for out in outputs), list(inputs.values()))
        ops.use_kernels("auto")
    assert seen[len(forward) :] == backward


def test_chunk_size_is_a_rule_of_shapes():
    sizes = [segments.chunk_size(num) for num in (0, 1, 512, 1024)]
    assert sizes == [0, 0, 0, 0], "up to the worst-case bucket of the paper's batch nothing is split"
    for num in (1025, 10**4, 10**6, 10**7, 2**31 - 2):
        chunk = segments.chunk_size(num)
        assert 64 <= chunk <= 1024 and chunk & (chunk - 1) == 0 and chunk <= num


@st.composite
def drawn_batches(draw):
    """Up to three graphs of up to six objects and twelve relations, zero among them; ends in any order."""
    sizes, subject, object_, first = [], [], [], 0
    for i in range(draw(st.integers(1, 3))):
        num_n = draw(st.integers(i == 0, 6))
        num_e = draw(st.integers(0, 12)) if num_n else 0
        node = st.integers(first, first + max(num_n, 1) - 1)
        subject += draw(st.lists(node, min_size=num_e, max_size=num_e))
        object_ += draw(st.lists(node, min_size=num_e, max_size=num_e))
        sizes.append((num_n, num_e))
        first += num_n
    return batch_of(np.asarray(subject, np.int64), np.asarray(object_, np.int64), sizes, draw(st.integers(0, 9)))


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=drawn_batches(), chunk=st.sampled_from([1, 2, 3, 5]))
def test_drawn_graphs_cut_into_tiny_chunks(op, monkeypatch, poisoned, batch, chunk):
    """Runs of every length against every chunk boundary."""
    cut_in_chunks(monkeypatch, chunk)
    compare(op, batch, 16 if chunk == 5 else 3, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def kernel_ops() -> dict[str, torch.library.CustomOpDef]:
    from sgg_fast.ops import graph_kernels
    from sgg_fast.ops.operator import Operator

    return {k: v.library for k, v in vars(graph_kernels).items() if isinstance(v, Operator)}


def test_every_operator_is_checked_below():
    names = {"gather_add_relu", "scatter_mean", "masked_pool", "graph_mean", "triple_context"}
    assert set(kernel_ops()) == names | {f"{name}_bwd" for name in names}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    """Schema, fake shapes, autograd registration and tracing, of the operator and of its backward."""
    batch = BATCHES["unsorted"]().to(device)
    inputs = {k: x.to(device).requires_grad_() for k, x in inputs_of(op, batch, 6, torch.float32).items()}
    name = op.removesuffix("_residual")
    calls: list[tuple[str, tuple]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sgg_fast":
                calls.append((func._schema.name.removeprefix("sgg_fast::"), args))
            return func(*args, **(kwargs or {}))

    ops.use_kernels("triton")
    with Record():
        outputs = call(op, inputs, batch)
        torch.autograd.grad(sum(out.sum() for out in outputs), list(inputs.values()))
    ops.use_kernels("auto")
    assert [made for made, _ in calls] == [name, f"{name}_bwd"]
    for made, args in calls:
        if made == name:  # the recorded arguments are below autograd
            args = (*inputs.values(), *args[len(inputs) :])
        else:
            args = (x.detach() if isinstance(x, torch.Tensor) else x for x in args)
        torch.library.opcheck(kernel_ops()[made], tuple(args))
