"""The Triton kernels as `torch.library` operators, with fake shapes for the compiler and gradients as operators.

Callers use `graph_ops`, which validates and chooses the backend. Triton is imported when a kernel first runs, so that
`import sgg_fast` works without it. Letters as in `graph_ops`; ptr, mid, slot are the plan of `SceneGraphBatch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operator import operator

Grads = tuple[Tensor | None, ...]


@operator("gather_add_relu")
def gather_add_relu(
    ac: Tensor, b: Tensor, bias: Tensor, subject: Tensor, object: Tensor, ptr: Tensor, mid: Tensor, slot: Tensor
) -> Tensor:
    """h [E, H]."""
    from sgg_kernels.gather_add_relu import gather_add_relu_fwd

    return gather_add_relu_fwd(ac, b, bias, subject, object)


@operator("gather_add_relu_bwd")
def gather_add_relu_bwd(
    grad: Tensor, h: Tensor, subject: Tensor, object: Tensor, ptr: Tensor, mid: Tensor, slot: Tensor,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ac [N, 2H], b [E, H] and bias [H]."""
    from sgg_kernels.gather_add_relu import gather_add_relu_bwd as run

    return run(grad, h, subject, object, ptr, mid, slot, bias_dtype)


@gather_add_relu.register_fake
def _(ac, b, bias, subject, object, ptr, mid, slot):
    return ac.new_empty(b.shape)


@gather_add_relu_bwd.register_fake
def _(grad, h, subject, object, ptr, mid, slot, bias_dtype):
    width = h.shape[1]
    ac, b = grad.new_empty(mid.shape[0], 2 * width), grad.new_empty(h.shape)
    return ac, b, grad.new_empty(width, dtype=bias_dtype)


def _save_gather_add_relu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[3:])
    ctx.dtypes = tuple(x.dtype for x in inputs[:3])


def _gather_add_relu_grads(ctx: Any, grad: Tensor) -> Grads:
    h, *index = ctx.saved_tensors
    ac_dtype, b_dtype, bias_dtype = ctx.dtypes
    ac, b, bias = gather_add_relu_bwd(grad, h, *index, bias_dtype)
    return ac.to(ac_dtype), b.to(b_dtype), bias, *[None] * 5


gather_add_relu.register_gradient(_gather_add_relu_grads, _save_gather_add_relu)


@operator("scatter_mean")
def scatter_mean(
    y: Tensor, bias: Tensor, residual: Tensor | None,
    subject: Tensor, object: Tensor, ptr: Tensor, mid: Tensor, slot: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Means [N, D] and new relations [E, D]."""
    from sgg_kernels.scatter_mean import scatter_mean_fwd

    return scatter_mean_fwd(y, bias, residual, subject, object, ptr, mid, slot)


@operator("scatter_mean_bwd")
def scatter_mean_bwd(
    grad_mean: Tensor, grad_r: Tensor, y: Tensor, bias: Tensor, subject: Tensor, object: Tensor, ptr: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y [E, 3D] and bias [3D]."""
    from sgg_kernels.scatter_mean import scatter_mean_bwd as run

    return run(grad_mean, grad_r, y, bias, subject, object, ptr)


@scatter_mean.register_fake
def _(y, bias, residual, subject, object, ptr, mid, slot):
    width = y.shape[1] // 3
    r_dtype = y.dtype if residual is None else torch.promote_types(y.dtype, residual.dtype)
    return y.new_empty(mid.shape[0], width), y.new_empty(y.shape[0], width, dtype=r_dtype)


@scatter_mean_bwd.register_fake
def _(grad_mean, grad_r, y, bias, subject, object, ptr):
    return y.new_empty(y.shape), bias.new_empty(bias.shape)


def _save_scatter_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, bias, residual, subject, object, ptr, _, _ = inputs
    ctx.save_for_backward(y, bias, subject, object, ptr)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _scatter_mean_grads(ctx: Any, grad_mean: Tensor | None, grad_r: Tensor | None) -> Grads:
    y, bias, subject, object, ptr = ctx.saved_tensors
    width, residual = y.shape[1] // 3, None
    if grad_r is None:
        grad_r = y.new_zeros(y.shape[0], width)
    elif ctx.residual_dtype is not None:
        residual = grad_r.to(ctx.residual_dtype)
    if grad_mean is None:
        grad_mean = y.new_zeros(ptr.shape[0] - 1, width)
    return *scatter_mean_bwd(grad_mean, grad_r, y, bias, subject, object, ptr), residual, *[None] * 5


scatter_mean.register_gradient(_scatter_mean_grads, _save_scatter_mean)


@operator("masked_pool")
def masked_pool(
    x: Tensor, r: Tensor, object_ptr: Tensor, relation_ptr: Tensor, object_graph: Tensor, relation_graph: Tensor,
    object_mask: Tensor, relation_mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pool [B, 2D], and the rows counted [2, B] int32."""
    from sgg_kernels.masked_pool import Rows, masked_pool_fwd

    objects = Rows(x, object_ptr, object_graph, object_mask)
    return masked_pool_fwd(objects, Rows(r, relation_ptr, relation_graph, relation_mask))


@operator("masked_pool_bwd")
def masked_pool_bwd(
    grad: Tensor, count: Tensor, object_graph: Tensor, relation_graph: Tensor, object_mask: Tensor,
    relation_mask: Tensor, x_dtype: torch.dtype, r_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x [N, D] and r [E, D]."""
    from sgg_kernels.masked_pool import pool_bwd

    grad_x, grad_r = pool_bwd(
        grad, count, [(object_graph, object_mask, x_dtype), (relation_graph, relation_mask, r_dtype)]
    )
    return grad_x, grad_r


@masked_pool.register_fake
def _(x, r, object_ptr, relation_ptr, object_graph, relation_graph, object_mask, relation_mask):
    num_graphs = object_ptr.shape[0] - 1
    return x.new_empty(num_graphs, 2 * x.shape[1]), x.new_empty(2, num_graphs, dtype=torch.int32)


@masked_pool_bwd.register_fake
def _(grad, count, object_graph, relation_graph, object_mask, relation_mask, x_dtype, r_dtype):
    width = grad.shape[1] // 2
    grad_x = grad.new_empty(object_graph.shape[0], width, dtype=x_dtype)
    return grad_x, grad.new_empty(relation_graph.shape[0], width, dtype=r_dtype)


def _save_masked_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[4:])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)


def _masked_pool_grads(ctx: Any, grad: Tensor, _: None) -> Grads:
    return *masked_pool_bwd(grad, *ctx.saved_tensors, *ctx.dtypes), *[None] * 6


masked_pool.register_gradient(_masked_pool_grads, _save_masked_pool)


@operator("graph_mean")
def graph_mean(rows: Tensor, ptr: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
    """Means [B, D], and the rows counted [1, B] int32."""
    from sgg_kernels.masked_pool import Rows, graph_mean_fwd

    return graph_mean_fwd(Rows(rows, ptr, graph))


@operator("graph_mean_bwd")
def graph_mean_bwd(grad: Tensor, count: Tensor, graph: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of rows [R, D]."""
    from sgg_kernels.masked_pool import pool_bwd

    return pool_bwd(grad, count, [(graph, None, dtype)])[0]


@graph_mean.register_fake
def _(rows, ptr, graph):
    num_graphs = ptr.shape[0] - 1
    return rows.new_empty(num_graphs, rows.shape[1]), rows.new_empty(1, num_graphs, dtype=torch.int32)


@graph_mean_bwd.register_fake
def _(grad, count, graph, dtype):
    return grad.new_empty(graph.shape[0], grad.shape[1], dtype=dtype)


def _save_graph_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[2])
    ctx.dtype = inputs[0].dtype


def _graph_mean_grads(ctx: Any, grad: Tensor, _: None) -> Grads:
    return graph_mean_bwd(grad, *ctx.saved_tensors, ctx.dtype), None, None


graph_mean.register_gradient(_graph_mean_grads, _save_graph_mean)


@operator("triple_context")
def triple_context(
    s: Tensor, r: Tensor, o: Tensor, pool: Tensor, bias: Tensor, subject: Tensor, object: Tensor, graph: Tensor,
    ptr: Tensor, mid: Tensor, slot: Tensor, relation_ptr: Tensor,
) -> Tensor:  # fmt: skip
    """Triple embeddings [E, H]."""
    from sgg_kernels.triple_context import triple_context_fwd

    return triple_context_fwd(s, r, o, pool, bias, subject, object, graph)


@operator("triple_context_bwd")
def triple_context_bwd(
    grad: Tensor, subject: Tensor, object: Tensor, graph: Tensor, ptr: Tensor, mid: Tensor, slot: Tensor,
    relation_ptr: Tensor, pool_dtype: torch.dtype, bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of s [N, H], o [N, H], pool [B, H] and bias [H]."""
    from sgg_kernels.triple_context import triple_context_bwd as run

    return run(grad, subject, object, graph, ptr, mid, slot, relation_ptr, pool_dtype, bias_dtype)


@triple_context.register_fake
def _(s, r, o, pool, bias, subject, object, graph, ptr, mid, slot, relation_ptr):
    return s.new_empty(r.shape)


@triple_context_bwd.register_fake
def _(grad, subject, object, graph, ptr, mid, slot, relation_ptr, pool_dtype, bias_dtype):
    num_objects, num_graphs, width = mid.shape[0], relation_ptr.shape[0] - 1, grad.shape[1]
    s, o = grad.new_empty(num_objects, width), grad.new_empty(num_objects, width)
    return s, o, grad.new_empty(num_graphs, width, dtype=pool_dtype), grad.new_empty(width, dtype=bias_dtype)


def _save_triple_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[5:])
    ctx.dtypes = tuple(x.dtype for x in inputs[:5])


def _triple_context_grads(ctx: Any, grad: Tensor) -> Grads:
    s_dtype, r_dtype, o_dtype, pool_dtype, bias_dtype = ctx.dtypes
    s, o, pool, bias = triple_context_bwd(grad, *ctx.saved_tensors, pool_dtype, bias_dtype)
    return s.to(s_dtype), grad.to(r_dtype), o.to(o_dtype), pool, bias, *[None] * 7


triple_context.register_gradient(_triple_context_grads, _save_triple_context)
