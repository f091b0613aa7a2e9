"""The UNet's and the VAE's Triton kernels as `torch.library` operators, with fake shapes and gradients.

Callers use `unet_ops`, which validates and chooses the backend. Triton is imported when a kernel first runs.
Letters: B images, S pixels of an image, C channels, R rows, D width, T keys, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operator import operator


@operator("group_norm_silu")
def group_norm_silu(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out [B, S, C], and the statistics of `group_norm_silu_fwd`, fp32 [B, C]."""
    from sgg_kernels.group_norm_silu import group_norm_silu_fwd

    return group_norm_silu_fwd(x, shift, weight, bias, num_groups, eps, silu)


@operator("group_norm_silu_bwd")
def group_norm_silu_bwd(
    grad: Tensor, x: Tensor, beside: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    offset: Tensor, num_groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [B, S, C] and of the shift fp32 [B, C] (empty without one), partial sums fp32 [B, 2C]."""
    from sgg_kernels.group_norm_silu_bwd import group_norm_silu_bwd as run

    return run(grad, x, beside, weight, bias, mean, rstd, offset, num_groups, silu)


@operator("column_sum")
def column_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Second stage of a parameter's gradient: fp32 [P, D] -> [D]."""
    from sgg_kernels.segments import column_sum as run

    return run(partial, dtype)


@column_sum.register_fake
def _(partial, dtype):
    return partial.new_empty(partial.shape[1], dtype=dtype)


@group_norm_silu.register_fake
def _(x, shift, weight, bias, num_groups, eps, silu):
    stats = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    offset = x.new_empty(0, dtype=torch.float32) if shift is None else torch.empty_like(stats)
    return x.new_empty(x.shape), stats, torch.empty_like(stats), offset


@group_norm_silu_bwd.register_fake
def _(grad, x, beside, weight, bias, mean, rstd, offset, num_groups, silu):
    return x.new_empty(x.shape), offset.new_empty(offset.shape), mean.new_empty(x.shape[0], 2 * x.shape[2])


def _save_group_norm_silu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, shift, weight, bias, num_groups, _, silu = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.num_groups, ctx.silu = num_groups, silu
    ctx.shift_dtype = None if shift is None else shift.dtype


def _group_norm_silu_grads(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, *stats = ctx.saved_tensors  # read once: activation checkpointing returns them only once
    grad_x, grad_shift, partial = group_norm_silu_bwd(grad, x, None, weight, bias, *stats, ctx.num_groups, ctx.silu)
    of_weight, of_bias = column_sum(partial, weight.dtype).split(weight.shape[0])
    of_shift = None if ctx.shift_dtype is None else grad_shift.to(ctx.shift_dtype)
    return grad_x, of_shift, of_weight, of_bias.to(bias.dtype), None, None, None


group_norm_silu.register_gradient(_group_norm_silu_grads, _save_group_norm_silu)


@operator("geglu")
def geglu(x: Tensor) -> Tensor:
    """Out [R, D] of x [R, 2D]."""
    from sgg_kernels.geglu import geglu_fwd

    return geglu_fwd(x)


@operator("geglu_bwd")
def geglu_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x [R, 2D]."""
    from sgg_kernels.geglu import geglu_bwd as run

    return run(grad, x)


@geglu.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@geglu_bwd.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _save_geglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _geglu_grads(ctx: Any, grad: Tensor) -> Tensor:
    return geglu_bwd(grad, ctx.saved_tensors[0])


geglu.register_gradient(_geglu_grads, _save_geglu)


@operator("cross_attention")
def cross_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Out [B, S, H, D], and log2 of the softmax's denominators, fp32 [B, H, S]."""
    from sgg_kernels.cross_attention import cross_attention_fwd

    return cross_attention_fwd(q, k, v, bias, scale)


@operator("cross_attention_bwd")
def cross_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q [B, S, H, D], and of k and v [2, B, T, H, D]."""
    from sgg_kernels.cross_attention import cross_attention_bwd as run

    return run(grad, q, k, v, bias, lse, scale)


@cross_attention.register_fake
def _(q, k, v, bias, scale):
    images, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(images, heads, queries, dtype=torch.float32)


@cross_attention_bwd.register_fake
def _(grad, q, k, v, bias, lse, scale):
    return q.new_empty(q.shape), k.new_empty(2, *k.shape)


def _save_cross_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _cross_attention_grads(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_q, both = cross_attention_bwd(grad, *ctx.saved_tensors, ctx.scale)
    return grad_q, both[0], both[1], None, None


cross_attention.register_gradient(_cross_attention_grads, _save_cross_attention)
