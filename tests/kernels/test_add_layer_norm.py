"""`add_layer_norm` against its pure-torch form and torch's own: values, all gradients, tiles, dtypes and batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import add_layer_norm as kernels
from support.cases.function import compare, evaluate
from support.cases.graph import randn
from support.kernels.unet import DTYPES, EPS, FORMS, ROWS, layer_norm, row_inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_add_layer_norm(name, form, dtype, device, poisoned, launched):
    compare(layer_norm, row_inputs(name, form, dtype), device)
    if ROWS[name][0]:
        assert launched == ["add_layer_norm_fwd_kernel", "add_layer_norm_bwd_kernel", "column_sum_kernel"]


def test_more_rows_than_programs(device, poisoned, monkeypatch):
    """A program walks several tiles, the last one partial; every number of programs gives the gradients."""
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "TILE", 256)
    assert kernels.programs_of(37, 96) == (2, 20)
    compare(layer_norm, row_inputs("several_tiles", "both"), device)


def test_against_torchs_own(device):
    """The reference is ours; torch's own layer is somebody else's."""
    inputs = {k: t.to(device) for k, t in row_inputs("several_tiles", "both").items()}

    def stock(x, weight, bias, residual, late):
        total = x + residual + late
        return F.layer_norm(total, total.shape[-1:], weight, bias, EPS), total

    found, want = evaluate("triton", layer_norm, inputs), evaluate("reference", stock, inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5)


def test_statistics_at_a_large_mean(device):
    """Mean 1e3, deviation 1: half a unit in the last place of 1e3 is 3e-5."""
    x = (1e3 + randn(0, 7, 320)).to(device)
    ones, zeros = torch.ones(320, device=device), torch.zeros(320, device=device)
    found = evaluate("triton", layer_norm, {"x": x, "weight": ones, "bias": zeros})["output 0"]
    assert (found.double() - F.layer_norm(x.double(), (320,), eps=EPS)).abs().max() < 1e-4


def test_autocast_dtypes_and_batches(device, poisoned):
    """bf16 rows [.., D] of any layout, fp32 parameters: each gradient in the dtype and shape of its input."""
    inputs = {k: t.to(device) for k, t in row_inputs("several_tiles", "both").items()}
    stream = ("x", "residual")
    mixed = {k: t.bfloat16().view(37, 1, 96) if k in stream else t for k, t in inputs.items()}
    mixed["x"] = torch.stack([mixed["x"]] * 2, -1)[..., 0]
    found = compare(layer_norm, mixed, device)
    for name, value in mixed.items():
        assert (found[f"grad {name}"].dtype, found[f"grad {name}"].shape) == (value.dtype, value.shape)


def test_same_bits_twice_and_rows_apart(device):
    inputs = {k: t.to(device) for k, t in row_inputs("several_tiles", "both").items()}
    first, again = (evaluate("triton", layer_norm, inputs) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    inputs["x"][1] = float("nan")
    beside, others = evaluate("triton", layer_norm, inputs), torch.arange(37, device=device) != 1
    for key in ("output 0", "output 1", "grad x"):
        assert torch.equal(beside[key][others], first[key][others]) and beside[key][1].isnan().all(), key
