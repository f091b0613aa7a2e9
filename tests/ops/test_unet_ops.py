"""The UNet's operators as a model calls them: torch's own results on any shape, what each refuses, and the fallback."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support.cases.graph import randn
from support.kernels.unet import EPS, attention_inputs

from sgg_fast import ops
from sgg_fast.ops import unet_ops

BACKENDS = pytest.mark.parametrize("backend", ops.BACKENDS)


@BACKENDS
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 2)])
def test_group_norms_are_torchs(spatial, recorded, backend):
    """With autograd and without, the shift added to every pixel; beside the norm, x comes back as it was."""
    ops.use_kernels(backend)
    x, weight, bias, shift = randn(0, 2, 8, *spatial), 1 + randn(1, 8), randn(2, 8), randn(3, 2, 8)
    x.requires_grad_(recorded)
    shifted = x + shift.view(2, 8, *[1] * len(spatial))
    for silu in (True, False):
        for given, total in ((None, x), (shift, shifted)):
            want = F.group_norm(total, 4, weight, bias, EPS)
            want = F.silu(want) if silu else want
            found = ops.group_norm_silu(x, weight, bias, 4, EPS, silu, given)
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
            assert found.requires_grad == recorded
            beside, past = ops.group_norm_silu_beside(x, weight, bias, 4, EPS, silu, given)
            torch.testing.assert_close(beside, want, rtol=1e-4, atol=1e-5)
            assert past.shape == x.shape and torch.equal(past, x)


@BACKENDS
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_layer_norms_are_torchs(shape, recorded, backend):
    """Of the sum of what is there, in any number of dimensions."""
    ops.use_kernels(backend)
    x, residual, weight, bias, late = (randn(i, *s) for i, s in enumerate((shape, shape, (6,), (6,), (6,))))
    x.requires_grad_(recorded)
    for rest in ((None, None), (residual, None), (None, late), (residual, late)):
        total = x + sum(t for t in rest if t is not None)
        norm, found = ops.add_layer_norm(x, weight, bias, EPS, *rest)
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(norm, F.layer_norm(total, (6,), weight, bias, EPS), rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_geglu_is_torchs(shape, backend):
    ops.use_kernels(backend)
    x = 2 * randn(0, *shape)
    values, gate = x.chunk(2, -1)
    torch.testing.assert_close(ops.geglu(x), values * F.gelu(gate), rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cross_attention_is_torchs(dtype, scale, backend):
    """Also in fp32, which the kernel does not take."""
    ops.use_kernels(backend)
    inputs, bias = attention_inputs("odd", dtype)
    heads = [x.double().transpose(1, 2) for x in inputs.values()]
    want = F.scaled_dot_product_attention(*heads, bias[:, None, None].double(), scale=scale).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    found = ops.cross_attention(*inputs.values(), bias, scale)
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype


def test_refusals():
    x, one = torch.zeros(2, 6, 3), torch.ones(6)
    for args, message in (
        ((x, one[:5], one, 2, 1e-5), r"weight and bias must be \[6\]"),
        ((x, one, one, 4, 1e-5), "4 groups do not divide 6"),
        ((x, one, one, 0, 1e-5), "0 groups"),
        ((x[:, :, :0], one, one, 2, 1e-5), "must have a pixel"),
        ((x, one.to("meta"), one, 2, 1e-5), "all tensors must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"group_norm_silu: .*{message}"):
            ops.group_norm_silu(*args)
    with pytest.raises(ValueError, match="geglu: the last dimension must be even"):
        ops.geglu(x)


def test_refusals_of_add_layer_norm():
    x, one = torch.zeros(2, 6), torch.ones(6)
    for args, message in (
        ((x, one[:5], one, EPS), r"weight, bias and late must be \[6\]"),
        ((x, one, one, EPS, x[:1]), "the residual must be torch.float32"),
        ((x, one, one, EPS, x.bfloat16()), "the residual must be torch.float32"),
        ((torch.zeros(2, 8193), one, one, EPS), "from 1 to 8192"),
        ((x, one.to("meta"), one, EPS), "all tensors must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
            ops.add_layer_norm(*args)


def test_refusals_of_cross_attention(monkeypatch):
    (q, k, v), bias = attention_inputs("odd")[0].values(), attention_inputs("odd")[1]
    for args, message in (
        ((q, k, v[:, :5], bias), "one shape"),
        ((q, k[..., :4], v[..., :4], bias), r"k must be \[3, T, 3, 13\]"),
        ((q, k[:, :0], v[:, :0], bias[:, :0]), "there must be a key"),
        ((q, k, v, bias[0]), r"bias must be \[3, 19\]"),
        ((q, k.bfloat16(), v, bias), "one dtype"),
        ((q, k, v, bias.clone().requires_grad_()), "detach it"),
        ((q, k, v, bias.to("meta")), "must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"cross_attention: .*{message}"):
            ops.cross_attention(*args)
    monkeypatch.setattr(unet_ops, "DEBUG", True)
    ops.cross_attention(q, k, v, bias)
    bias[1] = -math.inf
    with pytest.raises(ValueError, match="an image has no key"):
        ops.cross_attention(q, k, v, bias)
