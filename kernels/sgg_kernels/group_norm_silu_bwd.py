"""Backward of `group_norm_silu`, with the cut of the forward: one launch for small images, three for large ones.

The two sums of a group's gradient take the place of its statistics; the same sums by channel are the gradients of
weight and bias. Letters: B images, S pixels of an image, C channels, G groups, P chunks of pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .group_norm_layout import NormLayout, channel_values, group_sum, normalised
from .launch import launch
from .segments import columns

STAGES = 3
"""As in forward, for two tensors: tiles in flight, plus one."""


@triton.jit
def _outer_grad(p_grad, b_hat, i_S, C, o_C, m_SC, weight_C, bias_C, SILU: tl.constexpr):
    """Gradient of weight * xhat + bias from the gradient of the output, fp32 [BLOCK_S, BLOCK_C]."""
    b_grad = tl.load(p_grad + i_S[:, None] * C + o_C[None, :], mask=m_SC, other=0.0).to(tl.float32)
    if SILU:
        b_z = b_hat * weight_C[None, :] + bias_C[None, :]
        b_s = tl.sigmoid(b_z)
        b_grad *= b_s * (1.0 + b_z * (1.0 - b_s))
    return b_grad


@triton.jit
def _grad_sums(
    p_grad, p_x, begin, end, C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(sum of g xhat, sum of g) over the pixels begin .. end: an image's share of the gradients of weight and bias."""
    b_weight = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_bias = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        i_S = start + tl.arange(0, BLOCK_S)
        m_SC = (i_S < end)[:, None] & m_C[None, :]
        i_S = i_S.to(tl.int64)
        b_hat = normalised(p_x, i_S, C, o_C, m_SC, mean_C, rstd_C)
        b_g = _outer_grad(p_grad, b_hat, i_S, C, o_C, m_SC, weight_C, bias_C, SILU)
        b_weight += b_g * b_hat
        b_bias += b_g
    return tl.sum(b_weight, axis=0), tl.sum(b_bias, axis=0)


@triton.jit
def _write_grad_rows(
    p_grad, p_x, p_beside, p_out, begin, end, C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C, shift_C, slope_C,
    SILU: tl.constexpr, BESIDE: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad x = rstd (g weight - shift - xhat slope) of the pixels begin .. end; shift, slope: means over the group.

    With BESIDE plus the gradient that reaches x beside the norm.
    """
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        i_S = start + tl.arange(0, BLOCK_S)
        m_SC = (i_S < end)[:, None] & m_C[None, :]
        i_S = i_S.to(tl.int64)
        b_hat = normalised(p_x, i_S, C, o_C, m_SC, mean_C, rstd_C)
        b_g = _outer_grad(p_grad, b_hat, i_S, C, o_C, m_SC, weight_C, bias_C, SILU)
        b_g = rstd_C[None, :] * (b_g * weight_C[None, :] - shift_C[None, :] - b_hat * slope_C[None, :])
        if BESIDE:
            # [BLOCK_S, BLOCK_C]
            b_g += tl.load(p_beside + i_S[:, None] * C + o_C[None, :], mask=m_SC, other=0.0).to(tl.float32)
        tl.store(p_out + i_S[:, None] * C + o_C[None, :], b_g, mask=m_SC)


@triton.jit
def _shift_grad(sum_bias_C, weight_C, rstd_C, offset_C, mean_C, slope_C, S):
    """Sum of grad x over the pixels: rstd (weight sum(g) - S mean - slope sum(xhat)), sum(xhat) = S offset rstd."""
    return rstd_C * (weight_C * sum_bias_C - (mean_C + slope_C * offset_C * rstd_C) * S)


@triton.jit
def group_norm_silu_bwd_kernel(
    grad_ptr, x_ptr, beside_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, offset_ptr, grad_x_ptr, grad_shift_ptr,
    partial_ptr, S, C,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr, BESIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad x, grad shift, and the image's share of the gradients of weight and bias in partial [B, 2C].

    Bytes an element at bf16: 6 (grad and x read, grad x written), 8 with BESIDE, which saves a sum of 6; grad and x are
    read again from a cache.
    """
    num_tiles = C // CHANNELS
    i_b = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_tile = tl.arange(0, BLOCK_C)
    m_C = o_tile < CHANNELS
    o_C = tl.program_id(0) % num_tiles * CHANNELS + o_tile
    mean_C, rstd_C, weight_C, bias_C = channel_values(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i_b, C, o_C, m_C)
    o_image = i_b * S * C
    p_grad, p_x = grad_ptr + o_image, x_ptr + o_image
    sum_weight_C, sum_bias_C = _grad_sums(
        p_grad, p_x, 0, S, C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C, SILU, BLOCK_S, BLOCK_C, STAGES
    )
    tl.store(partial_ptr + i_b * 2 * C + o_C, sum_weight_C, mask=m_C)
    tl.store(partial_ptr + i_b * 2 * C + C + o_C, sum_bias_C, mask=m_C)
    num = S * 1.0 * SIZE
    shift_C = group_sum(sum_bias_C * weight_C, o_tile, SIZE) / num
    slope_C = group_sum(sum_weight_C * weight_C, o_tile, SIZE) / num
    if SHIFT:
        offset_C = tl.load(offset_ptr + i_b * C + o_C, mask=m_C, other=0.0)
        grad_C = _shift_grad(sum_bias_C, weight_C, rstd_C, offset_C, shift_C, slope_C, S)
        tl.store(grad_shift_ptr + i_b * C + o_C, grad_C, mask=m_C)
    _write_grad_rows(
        p_grad, p_x, beside_ptr + o_image, grad_x_ptr + o_image, 0, S, C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C,
        shift_C, slope_C, SILU, BESIDE, BLOCK_S, STAGES,
    )  # fmt: skip


@triton.jit
def group_norm_silu_bwd_stats_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, chunk_ptr, S, chunk, C,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """chunk[b, p] = (sum of g xhat | sum of g) over the pixels of chunk p, [2C]. 4 bytes an element at bf16."""
    i_bp, o_C, m_C = columns(C, BLOCK_C)
    num_p = tl.cdiv(S, chunk)
    i_b, begin = (i_bp // num_p).to(tl.int64), i_bp % num_p * chunk
    mean_C, rstd_C, weight_C, bias_C = channel_values(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i_b, C, o_C, m_C)
    o_image = i_b * S * C
    sum_weight_C, sum_bias_C = _grad_sums(
        grad_ptr + o_image, x_ptr + o_image, begin, tl.minimum(begin + chunk, S), C, o_C, m_C, mean_C, rstd_C,
        weight_C, bias_C, SILU, BLOCK_S, BLOCK_C, 1,
    )  # fmt: skip
    p_out = chunk_ptr + i_bp.to(tl.int64) * 2 * C + o_C
    tl.store(p_out, sum_weight_C, mask=m_C)
    tl.store(p_out + C, sum_bias_C, mask=m_C)


@triton.jit
def group_norm_silu_bwd_merge_kernel(
    chunk_ptr, weight_ptr, rstd_ptr, offset_ptr, partial_ptr, coefficient_ptr, grad_shift_ptr, S, num_p, C,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[b] = sum of chunk[b, :]; coefficient[b] = (slope | mean), its means over groups, by channel, [2C].

    With a shift, its gradient too, from the sums that the first half leaves in memory.
    """
    num_groups = C // SIZE
    i_b = (tl.program_id(0) // num_groups).to(tl.int64)
    first = tl.program_id(0) % num_groups * SIZE
    o_C, o_P = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    num = S * 1.0 * SIZE
    for i_half in tl.static_range(2):
        b_group = tl.zeros([BLOCK_C], tl.float32)
        for c in range(0, SIZE, BLOCK_C):
            m_C = c + o_C < SIZE
            o_channel = first + c + o_C
            b_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for start in range(0, num_p, BLOCK_P):
                i_p = (start + o_P).to(tl.int64)
                m_PC = (i_p < num_p)[:, None] & m_C[None, :]
                # [BLOCK_P, BLOCK_C]
                o_PC = (i_b * num_p + i_p)[:, None] * (2 * C) + (i_half * C + o_channel)[None, :]
                b_PC += tl.load(chunk_ptr + o_PC, mask=m_PC, other=0.0)
            b_sum = tl.sum(b_PC, axis=0)
            tl.store(partial_ptr + i_b * 2 * C + i_half * C + o_channel, b_sum, mask=m_C)
            b_group += b_sum * tl.load(weight_ptr + o_channel, mask=m_C, other=0.0).to(tl.float32)
        mean = tl.sum(b_group) / num
        for c in range(0, SIZE, BLOCK_C):
            o_out = i_b * 2 * C + i_half * C + first + c + o_C
            tl.store(coefficient_ptr + o_out, tl.zeros([BLOCK_C], tl.float32) + mean, mask=c + o_C < SIZE)
        if i_half == 0:
            slope = mean
        elif SHIFT:
            tl.debug_barrier()  # other threads stored the sums that are read here
            for c in range(0, SIZE, BLOCK_C):
                m_C = c + o_C < SIZE
                o_channel = first + c + o_C
                # [BLOCK_C] each
                sum_bias_C = tl.load(partial_ptr + i_b * 2 * C + C + o_channel, mask=m_C, other=0.0)
                weight_C = tl.load(weight_ptr + o_channel, mask=m_C, other=0.0).to(tl.float32)
                rstd_C = tl.load(rstd_ptr + i_b * C + o_channel, mask=m_C, other=0.0)
                offset_C = tl.load(offset_ptr + i_b * C + o_channel, mask=m_C, other=0.0)
                grad_C = _shift_grad(sum_bias_C, weight_C, rstd_C, offset_C, mean, slope, S)
                tl.store(grad_shift_ptr + i_b * C + o_channel, grad_C, mask=m_C)


@triton.jit
def group_norm_silu_bwd_apply_kernel(
    grad_ptr, x_ptr, beside_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, coefficient_ptr, grad_x_ptr, S, C,
    SILU: tl.constexpr, BESIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad x from the coefficients of the groups. 6 bytes an element at bf16, 8 with BESIDE."""
    i_bs, o_C, m_C = columns(C, BLOCK_C)
    num_s = tl.cdiv(S, BLOCK_S)
    i_b, begin = (i_bs // num_s).to(tl.int64), i_bs % num_s * BLOCK_S
    mean_C, rstd_C, weight_C, bias_C = channel_values(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i_b, C, o_C, m_C)
    # [BLOCK_C] each
    slope_C = tl.load(coefficient_ptr + i_b * 2 * C + o_C, mask=m_C, other=0.0)
    shift_C = tl.load(coefficient_ptr + i_b * 2 * C + C + o_C, mask=m_C, other=0.0)
    o_image = i_b * S * C
    _write_grad_rows(
        grad_ptr + o_image, x_ptr + o_image, beside_ptr + o_image, grad_x_ptr + o_image, begin,
        tl.minimum(begin + BLOCK_S, S), C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C, shift_C, slope_C,
        SILU, BESIDE, BLOCK_S, 1,
    )  # fmt: skip


def group_norm_silu_bwd(
    grad_BSC: torch.Tensor,
    x_BSC: torch.Tensor,
    beside_BSC: torch.Tensor | None,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    mean_BC: torch.Tensor,
    rstd_BC: torch.Tensor,
    offset_BC: torch.Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad x [B, S, C], grad shift fp32 [B, C], partial sums fp32 [B, 2C] of the gradients of weight and bias).

    beside: another gradient of x, which is added. offset: as the forward gives it; without a shift it is empty, and so
    is the gradient. `column_sum` of the partial sums is the second stage.
    """
    grad_BSC, x_BSC, weight_C, bias_C = (t.contiguous() for t in (grad_BSC, x_BSC, weight_C, bias_C))
    beside, added = beside_BSC is not None, beside_BSC.contiguous() if beside_BSC is not None else grad_BSC
    z, shifted = NormLayout.of(x_BSC, num_groups), offset_BC.numel() > 0
    grad_x = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
    partial = torch.empty(z.images, 2 * z.channels, dtype=torch.float32, device=x_BSC.device)
    grad_shift = torch.empty(offset_BC.shape, dtype=torch.float32, device=x_BSC.device)
    offset_BC, into = (offset_BC, grad_shift) if shifted else (mean_BC, partial)
    values = weight_C, bias_C, mean_BC, rstd_BC
    if z.whole:
        launch(
            group_norm_silu_bwd_kernel, z.whole_grid,
            grad_BSC, x_BSC, added, *values, offset_BC, grad_x, into, partial, z.pixels, z.channels,
            SILU=silu, SHIFT=shifted, BESIDE=beside, **z.whole_options, **z.staged(STAGES),
        )  # fmt: skip
        return grad_x, grad_shift, partial
    chunk_sums = torch.empty(z.images * z.num_chunks, 2 * z.channels, dtype=torch.float32, device=x_BSC.device)
    coefficient = torch.empty_like(partial)
    options = z.tile_options
    launch(
        group_norm_silu_bwd_stats_kernel, z.grid(z.num_chunks, options["BLOCK_C"]),
        grad_BSC, x_BSC, *values, chunk_sums, z.pixels, z.chunk, z.channels, SILU=silu, **options,
    )  # fmt: skip
    launch(
        group_norm_silu_bwd_merge_kernel, (z.images * num_groups,),
        chunk_sums, weight_C, rstd_BC, offset_BC, partial, coefficient, into, z.pixels, z.num_chunks, z.channels,
        SHIFT=shifted, **z.merge_options,
    )  # fmt: skip
    launch(
        group_norm_silu_bwd_apply_kernel, z.grid(triton.cdiv(z.pixels, options["BLOCK_S"]), options["BLOCK_C"]),
        grad_BSC, x_BSC, added, *values, coefficient, grad_x, z.pixels, z.channels, SILU=silu, BESIDE=beside, **options,
    )  # fmt: skip
    return grad_x, grad_shift, partial
