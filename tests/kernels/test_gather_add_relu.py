"""`gather_add_relu`: values and all gradients against the pure-torch form, and its launches."""

from __future__ import annotations

import pytest
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

CHECKED = ("gather_add_relu",)


@pytest.mark.parametrize("split", [False, True])
def test_launches(split, device, monkeypatch):
    """Exactly these kernels run; where runs are split, the first stage before the sum over runs."""
    if split:
        cut_in_chunks(monkeypatch, 4)
    forward, backward = launches_of("gather_add_relu", device)
    assert forward == ["gather_add_relu_fwd"]
    assert backward == [*["role_sums_hub"] * split, "role_sums", "column_sum"]
