"""`scatter_mean`: values and all gradients against the pure-torch form, its launches, a residual of another dtype."""

from __future__ import annotations

import pytest
import torch
from support.cases.graph import BATCHES, assert_within_rule, evaluate, inputs_of
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

CHECKED = ("scatter_mean", "scatter_mean_residual")


@pytest.mark.parametrize("split", [False, True])
def test_launches(split, device, monkeypatch):
    """Exactly these kernels run; where runs are split, the first stage before the sum over runs."""
    if split:
        cut_in_chunks(monkeypatch, 4)
    forward, backward = launches_of("scatter_mean", device)
    assert forward == [*["scatter_mean_fwd_hub"] * split, "scatter_mean_fwd"]
    assert backward == ["scatter_mean_bwd", "column_sum"]


def test_residual_of_another_dtype(device, poisoned):
    """Under autocast the relations' stream stays fp32 while y is bf16."""
    batch = BATCHES["unsorted"]().to(device)
    low = {k: x.to(device) for k, x in inputs_of("scatter_mean_residual", batch, 33, torch.bfloat16).items()}
    mixed = {k: x if k == "y" else x.float() for k, x in low.items()}
    exact = evaluate("reference", "scatter_mean_residual", {k: x.double() for k, x in low.items()}, batch)
    found, reference = (evaluate(backend, "scatter_mean_residual", mixed, batch) for backend in ("triton", "reference"))
    assert (found["out0"].dtype, found["out1"].dtype) == (torch.bfloat16, torch.float32)
    assert_within_rule(found, reference, exact)
