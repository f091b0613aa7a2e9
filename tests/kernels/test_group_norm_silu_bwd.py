"""The backward of `group_norm_silu`: its parts against float64, a gradient beside the norm's, mixed dtypes."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels.group_norm_silu import group_norm_silu_fwd
from sgg_kernels.group_norm_silu_bwd import group_norm_silu_bwd
from support.cases.function import compare, evaluate
from support.cases.graph import Tensors, assert_within_rule, randn
from support.kernels.unet import DTYPES, EPS, NORMS, norm_beside, norm_inputs, norm_of, shifted_inputs, split_images


def exact_grads(x, weight, bias, shift, grad, num_groups: int, silu: bool) -> Tensors:
    """By the formulas, in float64: of x and shift, and each image's part of the gradients of weight and bias."""
    x, weight, bias, shift, grad = (t.double() for t in (x, weight, bias, shift, grad))
    images, pixels, _ = x.shape
    grouped = (x + shift[:, None]).view(images, pixels, num_groups, -1)
    centred = grouped - grouped.mean((1, 3), keepdim=True)
    rstd = 1 / (centred.square().mean((1, 3), keepdim=True) + EPS).sqrt()
    hat = (centred * rstd).view_as(x)
    y = hat * weight + bias
    if silu:
        sigmoid = 1 / (1 + (-y).exp())
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    g, hat_g = (t.view_as(grouped) for t in (grad * weight, hat))
    of_x = rstd * (g - g.mean((1, 3), keepdim=True) - hat_g * (g * hat_g).mean((1, 3), keepdim=True))
    of_x = of_x.view_as(x)
    return {"x": of_x, "shift": of_x.sum(1), "partial": torch.cat([(grad * hat).sum(1), grad.sum(1)], 1)}


@pytest.mark.parametrize(
    ("name", "large", "silu"),
    [("10", False, True), ("odd", True, True), ("80", False, False), ("one_group", True, False)],
)
def test_every_part_is_the_formulas(name, large, silu, device, poisoned, monkeypatch):
    """With and without a gradient beside, which is added to that of x alone."""
    if large:
        split_images(monkeypatch)
    num_groups = NORMS[name][3]
    inputs = {k: t.to(device) for k, t in shifted_inputs(name, torch.float32).items()}
    x = inputs["x"].flatten(2).transpose(1, 2).contiguous()
    values = inputs["shift"], inputs["weight"], inputs["bias"]
    grad, beside = (randn(seed, *x.shape).to(device) for seed in (4, 5))
    _, *stats = group_norm_silu_fwd(x, *values, num_groups, EPS, silu)
    want = exact_grads(x, *values[1:], values[0], grad, num_groups, silu)
    for added in (None, beside):
        found = group_norm_silu_bwd(grad, x, added, *values[1:], *stats, num_groups, silu)
        of_x = want["x"] if added is None else want["x"] + added.double()
        for part, expected in zip(found, (of_x, want["shift"], want["partial"]), strict=True):
            torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_group_norm_beside(large, shifted, dtype, device, poisoned, launched, monkeypatch):
    if large:
        split_images(monkeypatch)
    inputs = shifted_inputs("10", dtype) if shifted else norm_inputs("10", dtype)
    found = compare(norm_beside, inputs, device)
    assert torch.equal(found["output 1"], inputs["x"].to(device))
    assert len(launched) == (7 if large else 3), "the sum of the two gradients is no launch"


@pytest.mark.parametrize("silu", [True, False])
def test_autocast_dtypes(silu, device, poisoned):
    """bf16 images, fp32 parameters: each gradient in the dtype of its input."""
    inputs = {k: t.to(device) for k, t in norm_inputs("20").items()}
    mixed = {**inputs, "x": inputs["x"].bfloat16()}
    run = norm_of("20", silu)
    found, low = (evaluate(backend, run, mixed) for backend in ("triton", "reference"))
    assert [found[f"grad {name}"].dtype for name in inputs] == [torch.bfloat16, torch.float32, torch.float32]
    assert_within_rule(found, low, evaluate("reference", run, {k: t.double() for k, t in mixed.items()}))
