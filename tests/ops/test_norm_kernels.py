"""Norms whose backward adds the gradient beside them: one output alone, no second derivative, the operators' schema."""

from __future__ import annotations

import pytest
import torch
from support.cases.function import compare
from support.kernels.unet import EPS, FORMS, ROWS, layer_norm, norm_beside, norm_inputs, row_inputs

from sgg_fast import ops
from sgg_fast.ops import norm_kernels


@pytest.mark.parametrize("op", [layer_norm, norm_beside])
def test_what_goes_past_the_norm_alone(op, device):
    """Only one of the two outputs is used: the other has no gradient, not a gradient of 0 from memory."""
    inputs = norm_inputs("10") if op is norm_beside else row_inputs("plain", "both")
    inputs = {k: t.to(device) for k, t in inputs.items()}
    compare(lambda **given: (op(**given)[0] * 1,), inputs, device)
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    ops.use_kernels("triton")
    grads = torch.autograd.grad(op(**leaves)[1].sum(), list(leaves.values()), allow_unused=True)
    expected = {"x": 1.0, "residual": 1.0, "late": float(ROWS["plain"][0])}
    for name, grad in zip(leaves, grads, strict=True):
        want = expected.get(name, 0.0)
        assert want == 0.0 if grad is None else torch.equal(grad, torch.full_like(grad, want)), name


@pytest.mark.parametrize("op", [layer_norm, norm_beside])
def test_there_is_no_second_derivative(op):
    ops.use_kernels("triton")
    inputs = norm_inputs("10") if op is norm_beside else row_inputs("odd", "both")
    x, *rest = (t.requires_grad_() for t in inputs.values())
    with pytest.raises(RuntimeError, match=r"sgg_fast::\w+ has no second derivative"):
        torch.autograd.grad(op(x, *rest)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, device):
    inputs = {k: t.to(device).requires_grad_() for k, t in row_inputs("odd", form).items()}
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    args = (x, inputs.get("residual"), inputs.get("late"), weight, bias, EPS)
    torch.library.opcheck(norm_kernels.add_layer_norm.library, args)
    out, total, mean, rstd = (t.detach() for t in norm_kernels.add_layer_norm(*args))
    total = total if total.numel() else x.detach()
    for beside in (None, out):
        given = (out, beside, total, weight.detach(), mean, rstd, "late" in inputs)
        torch.library.opcheck(norm_kernels.add_layer_norm_bwd.library, given)
