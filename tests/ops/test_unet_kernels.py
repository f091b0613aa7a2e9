"""The UNet's operators: schema, fake shapes, gradients, tracing, and what has no derivative."""

from __future__ import annotations

import pytest
import torch
from support.cases.function import Blocked
from support.cases.graph import randn
from support.kernels.unet import NORMS, attention_inputs, norm_inputs

from sgg_fast import ops
from sgg_fast.ops import unet_kernels
from sgg_fast.ops.operator import Operator


def test_every_operator_is_checked_here():
    found = {name for name, value in vars(unet_kernels).items() if isinstance(value, Operator)}
    both = {"group_norm_silu", "geglu", "cross_attention"}
    assert found == both | {f"{name}_bwd" for name in both} | {"column_sum"}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ["one_channel"])
def test_opcheck_group_norm(name, shifted, device):
    x, weight, bias = (t.to(device).requires_grad_() for t in norm_inputs(name).values())
    x_BSC = x.detach().flatten(2).transpose(1, 2).requires_grad_()
    shift = randn(3, *x.shape[:2]).to(device).requires_grad_() if shifted else None
    args = (x_BSC, shift, weight, bias, NORMS[name][3], 1e-5, True)
    torch.library.opcheck(unet_kernels.group_norm_silu.library, args)
    out, *stats = unet_kernels.group_norm_silu(*args)
    out, x_BSC, *given = (t.detach() for t in (out, x_BSC, weight, bias, *stats))
    for beside in (None, out):
        args = (out, x_BSC, beside, *given, NORMS[name][3], True)
        torch.library.opcheck(unet_kernels.group_norm_silu_bwd.library, args)


def test_opcheck_geglu(device):
    x = randn(0, 3, 20).to(device)
    torch.library.opcheck(unet_kernels.geglu.library, (x.requires_grad_(),))
    torch.library.opcheck(unet_kernels.geglu_bwd.library, (randn(1, 3, 10).to(device), x.detach()))


def test_opcheck_of_the_second_stage(device):
    torch.library.opcheck(unet_kernels.column_sum.library, (randn(0, 5, 7).to(device), torch.bfloat16))


def test_opcheck(device):
    inputs, bias = attention_inputs("odd")
    args = [x.to(device) for x in inputs.values()]
    torch.library.opcheck(
        unet_kernels.cross_attention.library, (*(x.requires_grad_() for x in args), bias.to(device), 0.3)
    )
    args = [x.detach() for x in args]
    out, lse = unet_kernels.cross_attention(*args, bias.to(device), 0.3)
    torch.library.opcheck(unet_kernels.cross_attention_bwd.library, (out, *args, bias.to(device), lse, 0.3))


def test_undefined_gradients_and_what_has_no_derivative(device):
    inputs, bias = attention_inputs("odd")
    leaves, bias = [x.to(device).requires_grad_() for x in inputs.values()], bias.to(device)
    ops.use_kernels("triton")
    try:
        out, lse = unet_kernels.cross_attention(*leaves, bias, 0.3)
        assert out.requires_grad and not lse.requires_grad

        assert torch.autograd.grad(Blocked.apply(out).sum(), leaves, allow_unused=True) == (None,) * 3
        with pytest.raises(RuntimeError, match="cross_attention has no second derivative"):
            torch.autograd.grad(ops.cross_attention(*leaves, bias).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda q: ops.cross_attention(q, *leaves[1:], bias).sum())(leaves[0].detach())
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises((NotImplementedError, RuntimeError), match="forward"),
        ):
            q = leaves[0].detach()
            ops.cross_attention(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), *leaves[1:], bias)
    finally:
        ops.use_kernels("auto")
