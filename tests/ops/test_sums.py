"""`ColumnSums`: the bits of each norm's own sum, in few launches, and which parameters it leaves out."""

from __future__ import annotations

import torch
from support.cases.graph import randn
from support.kernels.unet import EPS

from sgg_fast import ops


def test_sums_of_many_norms(device, launched):
    """Each parameter's gradient has the bits of its own norm's sum; norms with as many rows share a launch."""
    sums, bits = ops.ColumnSums(), {}
    weights = [torch.nn.Parameter(1 + 0.5 * randn(i, 40).to(device)) for i in range(4)]
    biases = [torch.nn.Parameter(randn(9 + i, 40).to(device)) for i in range(4)]
    late = torch.nn.Parameter(randn(20, 40).to(device))
    x, stream = randn(30, 2, 40, 5, 4).to(device), randn(31, 40, 40).to(device)

    def run() -> list[torch.Tensor]:
        first, past = ops.group_norm_silu_beside(x, weights[0], biases[0], 4, EPS, slot=sums.of(weights[0], biases[0]))
        second, _ = ops.group_norm_silu_beside(
            first + past, weights[1], biases[1], 2, EPS, slot=sums.of(weights[1], biases[1])
        )
        rows, total = ops.add_layer_norm(
            stream, weights[2], biases[2], EPS, stream, late, sums.of(weights[2], biases[2], late)
        )
        rows, _ = ops.add_layer_norm(rows, weights[3], biases[3], EPS, total, slot=sums.of(weights[3], biases[3]))
        return torch.autograd.grad((second.square().sum() + rows.square().sum()), [*weights, *biases, late])

    ops.use_kernels("triton")
    bits["apart"] = run()
    assert launched.count("column_sum_kernel") == 4
    launched.clear()
    sums.begin([*weights, *biases, late])
    bits["together"] = run()
    assert launched.count("column_sum_kernel") == 2, "one of two images' rows, one of the LayerNorms' programs"
    sums.end()
    assert sums.of(weights[0]) is None
    for apart, together in zip(bits["apart"], bits["together"], strict=True):
        assert torch.equal(apart, together) and together.storage_offset() * together.element_size() % 16 == 0


def test_sums_leave_out_what_is_not_trained(device):
    sums, weight, bias = ops.ColumnSums(), torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.zeros(8))
    bias.requires_grad_(False)
    sums.begin([weight, bias])
    assert sums.of(weight) is not None and sums.of(weight, bias) is None
    with torch.no_grad():
        sums.begin([weight, bias])
    assert sums.of(weight) is None
    sums.begin([])
    assert sums.token is None
