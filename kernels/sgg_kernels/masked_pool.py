"""Means and sums over the contiguous rows of each graph: the pools of eq. 7, the mean of eq. 8's tokens.

Letters: N objects, E relations, B graphs, R rows of either kind, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch
from .segments import (
    add_partials,
    as_rows,
    chunk_partials,
    chunk_size,
    columns,
    run_options,
    tile_options,
    whole_chunks,
)


class Rows(NamedTuple):
    """Rows to pool: x [R, D]; graph b owns the rows ptr[b] .. ptr[b+1]; graph [R]; mask [R] or None for all."""

    x: torch.Tensor
    ptr: torch.Tensor
    graph: torch.Tensor
    mask: torch.Tensor | None = None


@triton.jit
def _sum_run(
    x_ptr, mask_ptr, begin, end, first, skip, stride_x, o_D, m_D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Sum and number of the counted rows begin .. end less the `skip` from `first`; masked rows stay unread."""
    b_D = tl.zeros([BLOCK_D], tl.float32)
    count = 0
    for start in range(begin, end - skip, BLOCK_M):
        o_M = start + tl.arange(0, BLOCK_M)
        m_M = o_M < end - skip
        o_M = tl.where(o_M < first, o_M, o_M + skip)
        if MASK:
            m_M = m_M & (tl.load(mask_ptr + o_M, mask=m_M, other=0) != 0)
        m_MD = m_M[:, None] & m_D[None, :]
        # [BLOCK_M, BLOCK_D]
        b_MD = tl.load(x_ptr + o_M.to(tl.int64)[:, None] * stride_x + o_D[None, :], mask=m_MD, other=0.0)
        b_D += tl.sum(b_MD.to(tl.float32), axis=0)
        count += tl.sum(m_M.to(tl.int32), axis=0)
    return b_D, count


@triton.jit
def _pool_chunk(
    x_ptr, ptr_ptr, graph_ptr, mask_ptr, partial_ptr, partial_count_ptr, i_p, num_chunks, stride_x, chunk, D, o_D, m_D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Partial sum and count of chunk i_p if all its rows belong to one graph."""
    begin = i_p * chunk
    if i_p < num_chunks:  # noqa: SIM102 - in Triton `and` does not short-circuit
        if begin + chunk <= tl.load(ptr_ptr + tl.load(graph_ptr + begin) + 1):
            end = begin + chunk
            b_D, count = _sum_run(x_ptr, mask_ptr, begin, end, end, 0, stride_x, o_D, m_D, BLOCK_M, BLOCK_D, MASK)
            tl.store(partial_ptr + i_p.to(tl.int64) * D + o_D, b_D, mask=m_D)
            tl.store(partial_count_ptr + i_p, count)


@triton.jit
def _pool_graph(
    x_ptr, ptr_ptr, mask_ptr, partial_ptr, partial_count_ptr, p_out, p_count, i_b, stride_x, chunk, D, o_D, m_D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, MEAN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Mean or sum of graph i_b, and its count."""
    begin, end = tl.load(ptr_ptr + i_b), tl.load(ptr_ptr + i_b + 1)
    first, skip = whole_chunks(begin, end, chunk, SPLIT)
    b_D, count = _sum_run(x_ptr, mask_ptr, begin, end, first, skip, stride_x, o_D, m_D, BLOCK_M, BLOCK_D, MASK)
    b_D = add_partials(b_D, partial_ptr, first, skip, chunk, D, o_D, m_D, BLOCK_M, SPLIT)
    if SPLIT:
        chunks_end = (first + skip) // chunk
        for start in range(first // chunk, chunks_end, BLOCK_M):
            o_M = start + tl.arange(0, BLOCK_M)
            count += tl.sum(tl.load(partial_count_ptr + o_M, mask=o_M < chunks_end, other=0), axis=0)
    if MEAN:
        b_D /= tl.maximum(count, 1).to(tl.float32)
    tl.store(p_out + o_D, b_D, mask=m_D)
    tl.store(p_count, count)


@triton.jit(do_not_specialize=["num_chunks_x", "num_chunks_r", "chunk_x", "chunk_r"])
def masked_pool_fwd_hub_kernel(
    x_ptr, x_ptr_ptr, x_graph_ptr, x_mask_ptr, x_partial_ptr, x_partial_count_ptr, stride_x, num_chunks_x, chunk_x,
    r_ptr, r_ptr_ptr, r_graph_ptr, r_mask_ptr, r_partial_ptr, r_partial_count_ptr, stride_r, num_chunks_r, chunk_r,
    D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """First stage of a pool, for graphs that hold a whole chunk of rows; other chunks cost two 4-byte loads."""
    i_p, o_D, m_D = columns(D, BLOCK_D)
    if tl.program_id(1) == 0:
        _pool_chunk(
            x_ptr, x_ptr_ptr, x_graph_ptr, x_mask_ptr, x_partial_ptr, x_partial_count_ptr,
            i_p, num_chunks_x, stride_x, chunk_x, D, o_D, m_D, BLOCK_M, BLOCK_D, MASK,
        )  # fmt: skip
    else:
        _pool_chunk(
            r_ptr, r_ptr_ptr, r_graph_ptr, r_mask_ptr, r_partial_ptr, r_partial_count_ptr,
            i_p, num_chunks_r, stride_r, chunk_r, D, o_D, m_D, BLOCK_M, BLOCK_D, MASK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_graphs", "chunk_x", "chunk_r"])
def masked_pool_fwd_kernel(
    x_ptr, x_ptr_ptr, x_mask_ptr, x_partial_ptr, x_partial_count_ptr, stride_x, chunk_x,
    r_ptr, r_ptr_ptr, r_mask_ptr, r_partial_ptr, r_partial_count_ptr, stride_r, chunk_r,
    out_ptr, count_ptr, stride_out, num_graphs, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, MEAN: tl.constexpr, SPLIT_X: tl.constexpr, SPLIT_R: tl.constexpr,
):  # fmt: skip
    """out[b] = mean of x where object_mask | mean of r where relation_mask, over graph b; no row gives 0 [1].

    A grid of (.., 1) computes the first half alone. count[half, b]: rows counted, for backward.
    Bytes an element at bf16: 2 for each counted row, read once (the minimum); masked rows are not read.

    [1] SGG-IG (Wang et al., AAAI-25), eq. 7: pool_objects, pool_relations.
    """
    i_b, o_D, m_D = columns(D, BLOCK_D)
    p_out = out_ptr + i_b.to(tl.int64) * stride_out
    if tl.program_id(1) == 0:
        _pool_graph(
            x_ptr, x_ptr_ptr, x_mask_ptr, x_partial_ptr, x_partial_count_ptr, p_out, count_ptr + i_b,
            i_b, stride_x, chunk_x, D, o_D, m_D, BLOCK_M, BLOCK_D, MASK, MEAN, SPLIT_X,
        )  # fmt: skip
    else:
        _pool_graph(
            r_ptr, r_ptr_ptr, r_mask_ptr, r_partial_ptr, r_partial_count_ptr, p_out + D, count_ptr + num_graphs + i_b,
            i_b, stride_r, chunk_r, D, o_D, m_D, BLOCK_M, BLOCK_D, MASK, MEAN, SPLIT_R,
        )  # fmt: skip


def _pool(sets: list[Rows], dtype: torch.dtype, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, D or 2D], counts [1 or 2, B] int32) of one set of rows or of two."""
    sets = [rows._replace(x=as_rows(rows.x)) for rows in sets]
    num_graphs, width, device = len(sets[0].ptr) - 1, sets[0].x.shape[1], sets[0].x.device
    out = torch.empty(num_graphs, len(sets) * width, dtype=dtype, device=device)
    count = torch.empty(len(sets), num_graphs, dtype=torch.int32, device=device)
    # Each kind has its own chunk size: with 1,200 relations and 300 objects only the relations are split.
    chunks = [chunk_size(len(rows.x)) for rows in sets]
    partials = [chunk_partials(len(rows.x), chunk, width, out) for rows, chunk in zip(sets, chunks, strict=True)]
    counts = [torch.empty(len(partial), dtype=torch.int32, device=device) for partial in partials]
    options = run_options(num_graphs, width, max(rows.x.element_size() for rows in sets))
    options["MASK"] = sets[0].mask is not None
    num_d = triton.cdiv(width, options["BLOCK_D"])
    hub_args, args = [], []
    for k in (0, len(sets) - 1):
        (x, ptr, graph, mask), partial, chunk = sets[k], partials[k], chunks[k]
        mask = graph if mask is None else mask
        hub_args += [x, ptr, graph, mask, partial, counts[k], x.stride(0), len(partial), chunk]
        args += [x, ptr, mask, partial, counts[k], x.stride(0), chunk]
    hub_grid = (max(len(partial) for partial in partials) * num_d, len(sets))
    launch(masked_pool_fwd_hub_kernel, hub_grid, *hub_args, width, **options)
    launch(
        masked_pool_fwd_kernel, (num_graphs * num_d, len(sets)), *args, out, count, out.stride(0), num_graphs, width,
        MEAN=mean, SPLIT_X=chunks[0] > 0, SPLIT_R=chunks[-1] > 0, **options,
    )  # fmt: skip
    return out, count


def masked_pool_fwd(objects: Rows, relations: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(`concat(mean of x, mean of r)` [B, 2D] in the dtype of x, rows counted [2, B] int32)."""
    return _pool([objects, relations], objects.x.dtype, mean=True)


def graph_mean_fwd(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean of each graph's rows [B, D] in their dtype, rows counted [1, B] int32)."""
    return _pool([rows], rows.x.dtype, mean=True)


def graph_sum(x_RD: torch.Tensor, ptr_B1: torch.Tensor, graph_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of each graph's rows, [B, D]: the transpose of the gather `pool[graph]`."""
    return _pool([Rows(x_RD, ptr_B1, graph_R)], dtype, mean=False)[0]


@triton.jit
def _spread(
    p_grad, p_count, graph_ptr, mask_ptr, out_ptr, stride_grad, num_rows, D, i_block, o_D, m_D,
    BLOCK_E: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """out[e] = grad[graph] / count[graph] where the mask is set, else 0, for one block of rows."""
    o_E = i_block * BLOCK_E + tl.arange(0, BLOCK_E)
    m_E = o_E < num_rows
    i_b = tl.load(graph_ptr + o_E, mask=m_E, other=0)
    scale_E = 1.0 / tl.maximum(tl.load(p_count + i_b, mask=m_E, other=1), 1).to(tl.float32)
    m_counted = m_E
    if MASK:
        m_counted = m_E & (tl.load(mask_ptr + o_E, mask=m_E, other=0) != 0)
    # [BLOCK_E, BLOCK_D]
    p_ED = p_grad + i_b.to(tl.int64)[:, None] * stride_grad + o_D[None, :]
    b_ED = tl.load(p_ED, mask=m_counted[:, None] & m_D[None, :], other=0.0).to(tl.float32)
    b_ED = tl.where(m_counted[:, None], b_ED * scale_E[:, None], 0.0)
    tl.store(out_ptr + o_E.to(tl.int64)[:, None] * D + o_D[None, :], b_ED, mask=m_E[:, None] & m_D[None, :])


@triton.jit(do_not_specialize=["num_graphs", "num_x", "num_r"])
def masked_pool_bwd_kernel(
    grad_ptr, count_ptr, x_graph_ptr, x_mask_ptr, grad_x_ptr, num_x, r_graph_ptr, r_mask_ptr, grad_r_ptr, num_r,
    stride_grad, num_graphs, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """grad_x[n] = grad[graph, :D] / count where object_mask, grad_r[e] = grad[graph, D:] / count where relation_mask.

    Bytes an element at bf16: 2, each written once (the minimum); grad [B, 2D] is read from L2.
    """
    i_block, o_D, m_D = columns(D, BLOCK_D)
    num_blocks_x = tl.cdiv(num_x, BLOCK_E)
    if i_block < num_blocks_x:
        _spread(
            grad_ptr, count_ptr, x_graph_ptr, x_mask_ptr, grad_x_ptr, stride_grad, num_x, D, i_block, o_D, m_D,
            BLOCK_E, MASK,
        )  # fmt: skip
    else:
        _spread(
            grad_ptr + D, count_ptr + num_graphs, r_graph_ptr, r_mask_ptr, grad_r_ptr, stride_grad, num_r, D,
            i_block - num_blocks_x, o_D, m_D, BLOCK_E, MASK,
        )  # fmt: skip


def pool_bwd(
    grad_BD: torch.Tensor, count: torch.Tensor, sets: list[tuple[torch.Tensor, torch.Tensor | None, torch.dtype]]
) -> list[torch.Tensor]:
    """Gradient [R, D] of one set of rows or of two, each given as (graph [R], mask [R] or None, dtype)."""
    grad_BD, num_graphs = as_rows(grad_BD), count.shape[1]
    width = grad_BD.shape[1] // len(sets)
    grads = [torch.empty(len(graph), width, dtype=dtype, device=grad_BD.device) for graph, _, dtype in sets]
    options = tile_options(sum(map(len, grads)), width, grad_BD.element_size())
    args = []
    for k in (0, len(sets) - 1):
        graph, mask, _ = sets[k]
        args += [graph, graph if mask is None else mask, grads[k], len(grads[k])]
    num_blocks = sum(triton.cdiv(len(grad), options["BLOCK_E"]) for grad in grads)
    launch(
        masked_pool_bwd_kernel, (num_blocks * triton.cdiv(width, options["BLOCK_D"]),),
        grad_BD, count, *args, grad_BD.stride(0), num_graphs, width,
        MASK=sets[0][1] is not None, **options,
    )  # fmt: skip
    return grads
