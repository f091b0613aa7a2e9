"""`masked_pool` and `graph_mean`: values and all gradients against the pure-torch form, launches, sums of graphs."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import masked_pool
from support.cases.graph import BATCHES, call, inputs_of, randn
from support.kernels.graph_checks import (  # noqa: F401 - these tests run here, on CHECKED
    cut_in_chunks,
    launches_of,
    test_a_graph_does_not_see_its_neighbours,
    test_arguments_of_value_one,
    test_captured_in_a_cuda_graph,
    test_expanded_gradients,
    test_hub,
    test_many_programs,
    test_more_than_2_31_elements,
    test_nan_comes_through,
    test_non_contiguous_inputs,
    test_odd_and_aligned_widths,
    test_same_bits_twice,
    test_tensors_on_another_device_than_the_current,
    test_values_and_gradients,
)

from sgg_fast import ops

CHECKED = ("masked_pool", "graph_mean")


@pytest.mark.parametrize("split", [False, True])
def test_launches(op, split, device, monkeypatch):
    """Exactly these kernels run; where runs are split, the first stage before the sum over runs."""
    if split:
        cut_in_chunks(monkeypatch, 4)
    forward, backward = launches_of(op, device)
    assert forward == [*["masked_pool_fwd_hub"] * split, "masked_pool_fwd"]
    assert backward == ["masked_pool_bwd"]


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_sum(dtype, chunk, device, poisoned, monkeypatch):
    """The sum of each graph's rows, rounded once to the dtype asked for; 0 for a graph without rows."""
    cut_in_chunks(monkeypatch, chunk)
    batch = BATCHES["empty_groups"]().to(device)
    rows = randn(0, batch.num_relations, 33).to(device)
    found = masked_pool.graph_sum(rows, batch.relation_ptr, batch.relation_graph, dtype)
    exact = torch.zeros(batch.num_graphs, 33, dtype=torch.float64, device=device)
    exact.index_add_(0, batch.relation_graph.long(), rows.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found, exact.to(dtype), rtol=tolerance, atol=1e-6)


def test_masked_rows_are_not_read():
    """NaN in a row that the mask leaves out changes no result and no gradient, on either backend."""
    batch = BATCHES["unsorted"]()
    for backend in ops.BACKENDS:
        ops.use_kernels(backend)
        clean = inputs_of("masked_pool", batch, 5, torch.float32)
        spoiled = {k: x.clone() for k, x in clean.items()}
        for x, mask in zip(spoiled.values(), (batch.object_pooled, batch.relation_pooled), strict=True):
            assert (mask == 0).any()
            x[mask == 0] = torch.nan
        found = []
        for inputs in (clean, spoiled):
            leaves = [x.requires_grad_() for x in inputs.values()]
            (out,) = call("masked_pool", inputs, batch)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), backend
