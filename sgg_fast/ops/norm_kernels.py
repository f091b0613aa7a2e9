"""Norms in training: what reaches a norm's input beside it is added in the norm's backward kernel.

A residual stream goes into a norm and past it, so autograd adds two gradients there, in a launch of its own. These
functions return the stream together with the norm's result; their backward gets both gradients and adds them where it
writes. With a `Slot` the second stage of the parameters' gradients is left to `sums.ColumnSums`.
Letters: B images, S pixels of an image, C channels, R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operator import operator
from .sums import Slot
from .unet_kernels import column_sum, group_norm_silu, group_norm_silu_bwd


@operator("add_layer_norm")
def add_layer_norm(
    x: Tensor, residual: Tensor | None, late: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out and sum [R, D] (the sum is empty if there is nothing to add), mean and 1 / deviation fp32 [R]."""
    from sgg_kernels.add_layer_norm import add_layer_norm_fwd

    return add_layer_norm_fwd(x, residual, late, weight, bias, eps)


@operator("add_layer_norm_bwd")
def add_layer_norm_bwd(
    grad: Tensor, beside: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, late: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x [R, D], partial sums fp32 [P, 2D], with `late` [P, 3D]."""
    from sgg_kernels.add_layer_norm import add_layer_norm_bwd as run

    return run(grad, beside, total, weight, mean, rstd, late)


@add_layer_norm.register_fake
def _(x, residual, late, weight, bias, eps):
    rows = x.new_empty(x.shape[0], dtype=torch.float32)
    total = x.new_empty(0 if residual is None and late is None else x.shape)
    return x.new_empty(x.shape), total, rows, torch.empty_like(rows)


@add_layer_norm_bwd.register_fake
def _(grad, beside, total, weight, mean, rstd, late):
    from sgg_kernels.add_layer_norm import programs_of

    width = total.shape[1]
    return total.new_empty(total.shape), mean.new_empty(programs_of(*total.shape)[0], (3 if late else 2) * width)


def _parameter_grads(
    slot: Slot | None, partial: Tensor, parameters: list[Tensor], wanted: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of parameters of one width from their partial sums; None each if unwanted or if a slot takes them."""
    if slot is not None:
        slot.add(partial)
    if slot is not None or not wanted:
        return (None,) * len(parameters)
    both = column_sum(partial, parameters[0].dtype).split(parameters[0].shape[0])
    return tuple(grad.to(p.dtype) for grad, p in zip(both, parameters, strict=True))


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, late, weight, bias, _ = inputs
    _, total, mean, rstd = output
    summed = residual is not None or late is not None
    ctx.mark_non_differentiable(mean, rstd, *([] if summed else [total]))
    ctx.save_for_backward(total if summed else x, weight, bias, late, mean, rstd)
    ctx.has_residual, ctx.slot = residual is not None, None


def _add_layer_norm_grads(ctx: Any, grad: Tensor | None, beside: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, late, weight and bias, and None for eps."""
    total, weight, bias, late, mean, rstd = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total)  # only the sum is used
    grad_x, partial = add_layer_norm_bwd(grad, beside, total, weight, mean, rstd, late is not None)
    parameters = [weight, bias] if late is None else [weight, bias, late]
    wanted = any(ctx.needs_input_grad[2:5])
    of_weight, of_bias, *of_late = _parameter_grads(ctx.slot, partial, parameters, wanted)
    return grad_x, grad_x if ctx.has_residual else None, of_late[0] if of_late else None, of_weight, of_bias, None


add_layer_norm.register_gradient(_add_layer_norm_grads, _save_add_layer_norm)


class GroupNormBeside(torch.autograd.Function):
    """(group_norm_silu(x + shift), x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, token: Tensor | None,
        slot: Slot | None, num_groups: int, eps: float, silu: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x: [B, S, C]. token: the slot's, an input so that its backward comes after this one."""
        out, *stats = group_norm_silu.forward_only(x, shift, weight, bias, num_groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.slot, ctx.num_groups, ctx.silu = slot, num_groups, silu
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("sgg_fast::group_norm_silu has no second derivative")
        if grad is None:
            return beside, *(None,) * 8
        x, weight, bias, *stats = ctx.saved_tensors
        grad_x, grad_shift, partial = group_norm_silu_bwd(
            grad, x, beside, weight, bias, *stats, ctx.num_groups, ctx.silu
        )
        wanted = any(ctx.needs_input_grad[2:4])
        of_parameters = _parameter_grads(ctx.slot, partial, [weight, bias], wanted)
        of_shift = None if ctx.shift_dtype is None else grad_shift.to(ctx.shift_dtype)
        return grad_x, of_shift, *of_parameters, *(None,) * 5


class AddLayerNorm(torch.autograd.Function):
    """(layer_norm(sum), sum) with sum = x + residual + late."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, late: Tensor | None, weight: Tensor, bias: Tensor,
        token: Tensor | None, slot: Slot | None, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x, residual: [R, D]. token: the slot's, an input so that its backward comes after this one."""
        out, total, mean, rstd = add_layer_norm.forward_only(x, residual, late, weight, bias, eps)
        total = x if residual is None and late is None else total
        ctx.save_for_backward(total, weight, bias, late, mean, rstd)
        ctx.slot, ctx.has_residual = slot, residual is not None
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("sgg_fast::add_layer_norm has no second derivative")
        if grad is None and beside is None:
            return (None,) * 8
        return *_add_layer_norm_grads(ctx, grad, beside), None, None
