"""`triple_context`: values and all gradients against the pure-torch form, its launches, one tensor in two roles."""

from __future__ import annotations

import pytest
import torch
from support.cases.graph import BATCHES, call, inputs_of
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

CHECKED = ("triple_context",)


@pytest.mark.parametrize("split", [False, True])
def test_launches(split, device, monkeypatch):
    """Exactly these kernels run; where runs are split, the first stage before each sum over runs."""
    if split:
        cut_in_chunks(monkeypatch, 4)
    forward, backward = launches_of("triple_context", device)
    assert forward == ["triple_context_fwd"]
    of_graphs = [*["masked_pool_fwd_hub"] * split, "masked_pool_fwd"]
    assert backward == [*["role_sums_hub"] * split, "role_sums", *of_graphs, "column_sum"]


def test_one_tensor_in_two_roles(device, poisoned):
    """`--triple shared` passes s and o as the same tensor."""
    found = []
    for backend in ops.BACKENDS:
        batch = BATCHES["unsorted"]().to(device)
        inputs = {k: x.to(device) for k, x in inputs_of("triple_context", batch, 7).items()}
        ops.use_kernels(backend)
        both = inputs["s"].requires_grad_()
        call("triple_context", inputs | {"o": both}, batch)[0].square().sum().backward()
        found.append(both.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
