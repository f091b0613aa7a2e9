"""The pure-torch form of the UNet's kernels against torch's own layers in float64, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import reference
from support.cases.graph import randn

EPS = 1e-5
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-6}
"""And what a result of about 1 may be off by: its own rounding, and that of the weights of attention."""

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [randn(i, *shape).to(dtype) for i, shape in enumerate(shapes)]


def assert_is(found: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """The result is in the dtype of its input, and is the float64 one rounded."""
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("spatial", [(), (7,), (3, 2)])
def test_group_norm_silu_is_torchs(spatial, dtype):
    x, weight, bias, shift = drawn(dtype, (2, 6, *spatial), (6,), (6,), (2, 6))
    wide, weight_64, bias_64 = x.double(), weight.double(), bias.double()
    shifted = wide + shift.double().view(2, 6, *[1] * len(spatial))
    for given, total in ((None, wide), (shift, shifted)):
        want = F.group_norm(total, 2, weight_64, bias_64, EPS)
        assert_is(reference.group_norm_silu(x, weight, bias, 2, EPS, False, given), want, dtype)
        assert_is(reference.group_norm_silu(x, weight, bias, 2, EPS, True, given), F.silu(want), dtype)


@dtypes
def test_geglu_is_torchs(dtype):
    (x,) = drawn(dtype, (2, 5, 8))
    values, gate = x.double().chunk(2, -1)
    assert_is(reference.geglu(x), values * F.gelu(gate), dtype)


@dtypes
def test_add_layer_norm_is_torchs(dtype):
    """The sum is rounded to the dtype of x before its norm."""
    x, weight, bias, residual, late = drawn(dtype, (2, 3, 6), (6,), (6,), (2, 3, 6), (6,))
    for rest in ((None, None), (residual, None), (None, late), (residual, late)):
        norm, total = reference.add_layer_norm(x, weight, bias, EPS, *rest)
        exact = x.double() + sum(t.double() for t in rest if t is not None)
        torch.testing.assert_close(total, exact.to(dtype))
        assert_is(norm, F.layer_norm(total.double(), (6,), weight.double(), bias.double(), EPS), dtype)


@dtypes
def test_cross_attention_is_torchs(dtype):
    q, k, v, bias = drawn(dtype, (2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), (2, 5))
    bias[:, 3] = -10_000
    heads = [x.double().transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, bias[:, None, None].double(), scale=0.7).transpose(1, 2)
    assert_is(reference.cross_attention(q, k, v, bias, 0.7), want, dtype)


def test_statistics_keep_their_digits_at_a_large_mean():
    """Mean 1e3, deviation 1, in fp32: within a few units in the last place of 1e3 (6e-5), the rounding of the mean.

    E[x^2] - E[x]^2 would be off by the deviation.
    """
    x, one, zero = 1e3 + randn(0, 2, 6, 50), torch.ones(6), torch.zeros(6)
    found = reference.group_norm_silu(x, one, zero, 2, EPS, False)
    assert (found.double() - F.group_norm(x.double(), 2, eps=EPS)).abs().max() < 3e-4
    x, one, zero = x.reshape(6, 100), torch.ones(100), torch.zeros(100)
    found, _ = reference.add_layer_norm(x, one, zero, EPS)
    assert (found.double() - F.layer_norm(x.double(), (100,), eps=EPS)).abs().max() < 3e-4


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck_of_the_references(silu):
    x, weight, bias = randn(0, 2, 6, 3).double(), randn(1, 6).double(), randn(2, 6).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: reference.group_norm_silu(*t, 2, 1e-5, silu), leaves)
    leaves.append(randn(4, 2, 6).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: reference.group_norm_silu(*t[:3], 2, 1e-5, silu, t[3]), leaves)
    assert torch.autograd.gradcheck(reference.geglu, [randn(3, 2, 8).double().requires_grad_()])


@pytest.mark.parametrize("op", ["add_layer_norm", "cross_attention"])
def test_gradcheck_of_the_reference(op):
    if op == "add_layer_norm":
        leaves = drawn(torch.float64, (3, 5), (5,), (5,), (3, 5), (5,))
        run = lambda *t: reference.add_layer_norm(*t[:3], EPS, *t[3:])  # noqa: E731
    else:
        leaves = drawn(torch.float64, *((2, n, 2, 4) for n in (3, 5, 5)))
        bias = randn(4, 2, 5).double()
        run = lambda *t: reference.cross_attention(*t, bias, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves])
