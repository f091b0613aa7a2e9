"""The graph ops as the model sees them: what runs, refusals, gradients of the reference, a short training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sgg_kernels import launch
from support import graphs
from support.cases.graph import BATCHES, OPS, call, inputs_of

from sgg_fast import ops
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.encoder import TripleConv
from sgg_fast.ops import graph_ops


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_an_explicit_choice_is_what_runs(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    batch, seen = BATCHES["scenes"](), []
    ops.use_kernels(backend)
    with launch.intercept(lambda kernel, *_: seen.append(kernel) or False):
        for op in OPS:
            call(op, inputs_of(op, batch, 4), batch)
    assert len(seen) == (len(OPS) if backend == "triton" else 0)


@pytest.mark.parametrize(
    ("op", "name", "wrong"),
    [
        ("gather_add_relu", "ac", lambda x: x[:, 1:]),
        ("gather_add_relu", "ac", lambda x: x[1:]),
        ("gather_add_relu", "b", lambda x: x[1:]),
        ("gather_add_relu", "bias", lambda x: x[1:]),
        ("scatter_mean", "y", lambda x: x[:, 1:]),
        ("scatter_mean", "y", lambda x: x[1:]),
        ("scatter_mean", "bias", lambda x: x[1:]),
        ("scatter_mean_residual", "residual", lambda x: x[:, 1:]),
        ("masked_pool", "x", lambda x: x[1:]),
        ("masked_pool", "r", lambda x: x[:, 1:]),
        ("graph_mean", "rows", lambda x: x[1:]),
        ("triple_context", "s", lambda x: x[1:]),
        ("triple_context", "r", lambda x: x[1:]),
        ("triple_context", "pool", lambda x: x[1:]),
        ("triple_context", "bias", lambda x: x[1:]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op, name, wrong):
    batch = BATCHES["scenes"]()
    inputs = inputs_of(op, batch, 4)
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ValueError, match=op.removesuffix("_residual")):
        call(op, inputs, batch)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("subject", "subject and object must lie in 0..14"),
        ("message_slot", "slot must"),
        ("message_ptr", "plan ptr must rise from 0 to 120"),
        ("message_mid", "mid must lie within|slot must list"),
        ("relation_graph", "relation graph must follow from its ptr"),
        ("object_ptr", "object ptr must rise from 0 to 15"),
    ],
)
def test_debugging_reads_index_tensors(field, message, monkeypatch):
    """One wrong number in any of them is named; sound batches, exchanged ends among them, pass."""
    monkeypatch.setattr(graph_ops, "DEBUG", True)
    batch = BATCHES["unsorted"]()
    swapped = ops.exchange_ends(batch, torch.arange(batch.num_relations) % 2 == 0)
    for sound in (batch, swapped, BATCHES["no_relations"](), BATCHES["empty_groups"]()):
        for op in OPS:
            call(op, inputs_of(op, sound, 3), sound)
    index = getattr(batch, field).clone()
    index[len(index) // 2] = 77 if field != "relation_graph" else 0
    spoiled = dataclasses.replace(batch, **{field: index})
    with pytest.raises(ValueError, match=message):
        for op in OPS:
            call(op, inputs_of(op, spoiled, 3), spoiled)


def test_wide_indices_are_refused_by_the_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    batch = BATCHES["scenes"]()
    ops.use_kernels("triton")
    with pytest.raises(ValueError, match="graph_mean: index tensors must be int32"):
        ops.graph_mean(torch.randn(batch.num_relations, 3), batch.relation_ptr.long(), batch.relation_graph)


@pytest.mark.parametrize("op", OPS)
def test_reference_gradients_in_float64(op):
    batch = BATCHES["empty_groups"]()
    inputs = inputs_of(op, batch, 2, torch.float64)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call(op, dict(zip(inputs, values, strict=True)), batch)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()], eps=1e-6)


def test_a_compiled_layer_is_one_graph(device):
    """torch.compile sees through the operators, forward and backward, without a graph break."""
    batch = BATCHES["scenes"]().to(device)
    layer = TripleConv(8).to(device)
    x, r = (torch.randn(num, 8, device=device) for num in (batch.num_objects, batch.num_relations))
    ops.use_kernels("triton")
    found = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        x_new, r_new = function(x, r, batch)
        (x_new.sum() + r_new.square().sum()).backward()
        found.append([x_new, r_new, *(p.grad.clone() for p in layer.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def trace(backend: str, dtype: torch.dtype, device: str, steps: int = 5) -> list[float]:
    """Losses of a tiny conditioner that learns random targets; `dtype` by autocast, weights in fp32."""
    torch.manual_seed(3)
    table = graphs.shared_table()
    batch, _ = graphs.pack(*graphs.all_graphs()[:4], table=table)
    batch, names = batch.to(device), graphs.embeddings(table, 16).to(device)
    model = SceneGraphConditioner(name_dim=16, image_dim=16, context_dim=24, width=16, num_layers=2).to(device)
    target = torch.randn(batch.num_graphs, 16, generator=torch.Generator().manual_seed(4)).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    ops.use_kernels(backend)
    losses = []
    for _ in range(steps):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            x_ND, tokens_EC, x_global = model.encode(names, batch)
            loss = (x_global.float() - target).square().mean() + tokens_EC.float().square().mean()
            loss = loss + 0.1 * x_ND.float().square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_training_follows_the_reference(dtype, device):
    """At each step the fused trace is as close to the reference's as its precision allows."""
    fused, reference = trace("triton", dtype, device), trace("reference", dtype, device)
    exact = trace("reference", torch.float32, device)
    assert exact[-1] < 0.9 * exact[0], "the model learns, so the traces carry gradients"
    for step, (a, b, c) in enumerate(zip(fused, reference, exact, strict=True)):
        assert abs(a - b) <= 2 * abs(b - c) + 1e-5, f"step {step}: {a} against {b}, fp32 {c}"
