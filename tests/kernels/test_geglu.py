"""`geglu` against its pure-torch form: values, gradients, the exact gelu, strided and extreme inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support.cases.function import compare, evaluate
from support.cases.graph import randn
from support.kernels.unet import DTYPES

from sgg_fast import ops

GATES = {"plain": (5, 66), "wide": (3, 2 * 300), "odd": (7, 2), "batch": (2, 3, 20), "vector": (8,), "empty": (0, 12)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_geglu(name, dtype, device, poisoned, launched):
    compare(ops.geglu, {"x": (2 * randn(0, *GATES[name])).to(dtype)}, device)
    assert launched == ([] if name == "empty" else ["geglu_fwd_kernel", "geglu_bwd_kernel"])


def test_geglu_is_exact_and_not_the_tanh_form(device):
    """Against math.erf's values by torch in float64: the tanh form is off by up to 5e-4."""
    gate = torch.linspace(-6, 6, 97)
    x = torch.cat([torch.ones(97), gate])[None].to(device)
    found = evaluate("triton", ops.geglu, {"x": x})["out"][0].cpu().double()
    exact = 0.5 * gate.double() * (1 + torch.erf(gate.double() / 2**0.5))
    assert (found - exact).abs().max() < 2e-6
    assert (F.gelu(gate, approximate="tanh").double() - exact).abs().max() > 1e-4


def test_geglu_of_strided_and_extreme_inputs(device, poisoned):
    wide = torch.full((4, 71), float("nan"))
    wide[:, 3:69] = 2 * randn(0, 4, 66)
    wide[0, 36:40] = torch.tensor([1e4, -1e4, 0.0, -0.0])
    found = compare(ops.geglu, {"x": wide[:, 3:69]}, device)
    assert all(t.isfinite().all() for t in found.values())
