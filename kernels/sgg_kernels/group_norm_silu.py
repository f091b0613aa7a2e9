"""GroupNorm and SiLU (or none) of channels-last images in one pass over them. Letters: B images, S pixels of an image,
C channels, G groups, P chunks of pixels.

A group of Stable Diffusion has 4 to 80 channels, mostly no power of two, so groups do not align with tiles. Statistics
are kept by channel, as (mean, sum of squared deviations), and Chan's formula merges channels into groups. Mean and
1 / deviation are stored by channel too: C / G times a few bytes, and every access is contiguous. Images of up to
ONE_PASS_PIXELS take one launch with one program for each run of whole groups; it reads its columns twice, the second
time from a cache. Larger images take three launches: statistics of chunks (`_stats`), merged into groups (`_merge`),
applied (`_apply`). In backward the two sums of a group take the place of its statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .group_norm_layout import NormLayout, channel_values, group_sum, normalised
from .launch import launch
from .segments import as_rows, columns

STAGES = 4
"""Tiles of the single launch in flight, plus one: two loads a lane do not fill the SM that a program has to itself."""


@triton.jit
def _channel_stats(p_x, begin, end, C, o_C, m_C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr):
    """(mean, sum of squared deviations) of every channel over the pixels begin .. end, each fp32 [BLOCK_C].

    Lane k runs Welford's recurrence over the pixels begin + k, begin + k + BLOCK_S ..; the formula of Chan, Golub &
    LeVeque (1983) merges the lanes.
    """
    b_mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    o_S = tl.arange(0, BLOCK_S)
    num = 0.0
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        m_SC = (start + o_S < end)[:, None] & m_C[None, :]
        # [BLOCK_S, BLOCK_C]
        b_x = tl.load(p_x + (start + o_S).to(tl.int64)[:, None] * C + o_C[None, :], mask=m_SC, other=0.0)
        b_x = b_x.to(tl.float32)
        num += 1.0
        b_off = tl.where(m_SC, b_x - b_mean, 0.0)
        b_mean += b_off * (1.0 / num)
        b_m2 += b_off * (b_x - b_mean)
    b_num = (tl.maximum(end - begin - o_S + BLOCK_S - 1, 0) // BLOCK_S).to(tl.float32)[:, None]
    total = (end - begin) * 1.0
    mean_C = tl.sum(b_num * b_mean, axis=0) / total
    b_off = b_mean - mean_C[None, :]
    # The sum above is rounded relative to the mean; the smaller deviations correct it.
    mean_C += tl.sum(b_num * b_off, axis=0) / total
    return mean_C, tl.sum(b_m2 + b_num * b_off * b_off, axis=0)


@triton.jit
def _write_rows(
    p_x, p_out, begin, end, C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = silu((x - mean) rstd weight + bias) of the pixels begin .. end."""
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        i_S = start + tl.arange(0, BLOCK_S)
        m_SC = (i_S < end)[:, None] & m_C[None, :]
        i_S = i_S.to(tl.int64)
        b_z = normalised(p_x, i_S, C, o_C, m_SC, mean_C, rstd_C) * weight_C[None, :] + bias_C[None, :]
        if SILU:
            b_z *= tl.sigmoid(b_z)
        tl.store(p_out + i_S[:, None] * C + o_C[None, :], b_z, mask=m_SC)


@triton.jit
def group_norm_silu_fwd_kernel(
    x_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, offset_ptr, stride_shift, S, C,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = silu(group_norm(x + shift)); a program takes CHANNELS columns (whole groups of SIZE) of one image [1].

    A shift of [B, C] moves a channel's mean and nothing else: it costs no pass over x. `mean` is stored less the shift,
    so that x - mean is right for x without it; `offset` is the channel's mean less the group's, for backward.

    Bytes an element at bf16: 4 (x read, out written); x is read again from a cache. Eager under autocast casts x to
    fp32, normalises, applies SiLU and casts back: 2 + 4, 4 + 4, 4 + 4, 4 + 2 in four launches.

    [1] Wu & He, Group normalization (2018).
    """
    num_tiles = C // CHANNELS
    i_b = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_tile = tl.arange(0, BLOCK_C)
    m_C = o_tile < CHANNELS
    o_C = tl.program_id(0) % num_tiles * CHANNELS + o_tile
    p_x = x_ptr + i_b * S * C
    mean_C, m2_C = _channel_stats(p_x, 0, S, C, o_C, m_C, BLOCK_S, BLOCK_C, STAGES)
    if SHIFT:
        shift_C = tl.load(shift_ptr + i_b * stride_shift + o_C, mask=m_C, other=0.0).to(tl.float32)
        mean_C += shift_C
    group_mean_C = group_sum(mean_C, o_tile, SIZE) / SIZE
    off_C = mean_C - group_mean_C
    group_mean_C += group_sum(off_C, o_tile, SIZE) / SIZE
    num = S * 1.0
    rstd_C = 1.0 / tl.sqrt(group_sum(m2_C + num * off_C * off_C, o_tile, SIZE) / (num * SIZE) + EPS)
    weight_C = tl.load(weight_ptr + o_C, mask=m_C, other=0.0).to(tl.float32)
    bias_C = tl.load(bias_ptr + o_C, mask=m_C, other=0.0).to(tl.float32)
    if SHIFT:
        tl.store(offset_ptr + i_b * C + o_C, mean_C - group_mean_C, mask=m_C)
        group_mean_C -= shift_C
    tl.store(mean_ptr + i_b * C + o_C, group_mean_C, mask=m_C)
    tl.store(rstd_ptr + i_b * C + o_C, rstd_C, mask=m_C)
    _write_rows(
        p_x, out_ptr + i_b * S * C, 0, S, C, o_C, m_C, group_mean_C, rstd_C, weight_C, bias_C, SILU, BLOCK_S, STAGES
    )


@triton.jit
def group_norm_silu_stats_kernel(
    x_ptr, mean_ptr, m2_ptr, S, chunk, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean, m2)[b, p, c] of every channel over the pixels of chunk p. 2 bytes an element at bf16."""
    i_bp, o_C, m_C = columns(C, BLOCK_C)
    num_p = tl.cdiv(S, chunk)
    begin = i_bp % num_p * chunk
    p_x = x_ptr + (i_bp // num_p).to(tl.int64) * S * C
    mean_C, m2_C = _channel_stats(p_x, begin, tl.minimum(begin + chunk, S), C, o_C, m_C, BLOCK_S, BLOCK_C, 1)
    o_out = i_bp.to(tl.int64) * C + o_C
    tl.store(mean_ptr + o_out, mean_C, mask=m_C)
    tl.store(m2_ptr + o_out, m2_C, mask=m_C)


@triton.jit
def _chunk_mean(chunk_mean_ptr, shift_ptr, o_PC, o_shift_C, m_PC, SHIFT: tl.constexpr):
    """Mean of x, or of x + shift, by chunk and channel, [BLOCK_P, BLOCK_C]."""
    b_PC = tl.load(chunk_mean_ptr + o_PC, mask=m_PC, other=0.0)
    if SHIFT:
        b_PC += tl.load(shift_ptr + o_shift_C[None, :], mask=m_PC, other=0.0).to(tl.float32)
    return b_PC


@triton.jit
def group_norm_silu_merge_kernel(
    chunk_mean_ptr, chunk_m2_ptr, shift_ptr, mean_ptr, rstd_ptr, offset_ptr, stride_shift, S, chunk, C,
    SIZE: tl.constexpr, EPS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of chunks and channels into those of one group by Chan's formula; stored by channel.

    Two passes over [P, C / G] partials: the mean of all, then the deviations from it. With a shift, one more pass.
    """
    num_p = tl.cdiv(S, chunk)
    num_groups = C // SIZE
    i_b = (tl.program_id(0) // num_groups).to(tl.int64)
    first = tl.program_id(0) % num_groups * SIZE
    p_row = i_b * num_p * C + first
    first_shift = i_b * stride_shift + first
    o_C, o_P = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    total = S * 1.0 * SIZE
    b_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, num_p, BLOCK_P):
        i_p = start + o_P
        b_num = tl.maximum(tl.minimum(S - i_p * chunk, chunk), 0).to(tl.float32)[:, None]
        for c in range(0, SIZE, BLOCK_C):
            m_PC = (i_p < num_p)[:, None] & (c + o_C < SIZE)[None, :]
            # [BLOCK_P, BLOCK_C]
            o_PC = p_row + i_p.to(tl.int64)[:, None] * C + (c + o_C)[None, :]
            b_PC += b_num * _chunk_mean(
                chunk_mean_ptr, shift_ptr, o_PC, i_b * stride_shift + first + c + o_C, m_PC, SHIFT
            )
    mean = tl.sum(b_PC) / total
    b_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_shift = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, num_p, BLOCK_P):
        i_p = start + o_P
        b_num = tl.maximum(tl.minimum(S - i_p * chunk, chunk), 0).to(tl.float32)[:, None]
        for c in range(0, SIZE, BLOCK_C):
            m_PC = (i_p < num_p)[:, None] & (c + o_C < SIZE)[None, :]
            o_PC = p_row + i_p.to(tl.int64)[:, None] * C + (c + o_C)[None, :]
            b_mean = _chunk_mean(chunk_mean_ptr, shift_ptr, o_PC, first_shift + c + o_C, m_PC, SHIFT)
            b_off = tl.where(m_PC, b_mean - mean, 0.0)
            b_shift += b_num * b_off
            b_PC += tl.load(chunk_m2_ptr + o_PC, mask=m_PC, other=0.0) + b_num * b_off * b_off
    mean += tl.sum(b_shift) / total
    rstd = 1.0 / tl.sqrt(tl.sum(b_PC) / total + EPS)
    for c in range(0, SIZE, BLOCK_C):
        m_C = c + o_C < SIZE
        o_out = i_b * C + first + c + o_C
        mean_C = tl.zeros([BLOCK_C], tl.float32) + mean
        if SHIFT:
            o_shift = first_shift + c + o_C
            b_off = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for start in range(0, num_p, BLOCK_P):
                i_p = start + o_P
                m_PC = (i_p < num_p)[:, None] & m_C[None, :]
                b_num = tl.maximum(tl.minimum(S - i_p * chunk, chunk), 0).to(tl.float32)[:, None]
                o_PC = p_row + i_p.to(tl.int64)[:, None] * C + (c + o_C)[None, :]
                b_mean = _chunk_mean(chunk_mean_ptr, shift_ptr, o_PC, o_shift, m_PC, SHIFT)
                b_off += b_num * tl.where(m_PC, b_mean - mean, 0.0)
            tl.store(offset_ptr + o_out, tl.sum(b_off, axis=0) / S, mask=m_C)
            mean_C -= tl.load(shift_ptr + o_shift, mask=m_C, other=0.0).to(tl.float32)
        tl.store(mean_ptr + o_out, mean_C, mask=m_C)
        tl.store(rstd_ptr + o_out, tl.zeros([BLOCK_C], tl.float32) + rstd, mask=m_C)


@triton.jit
def group_norm_silu_apply_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, out_ptr, S, C,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = silu((x - mean) rstd weight + bias), mean and rstd by channel. 4 bytes an element at bf16."""
    i_bs, o_C, m_C = columns(C, BLOCK_C)
    num_s = tl.cdiv(S, BLOCK_S)
    i_b, begin = (i_bs // num_s).to(tl.int64), i_bs % num_s * BLOCK_S
    mean_C, rstd_C, weight_C, bias_C = channel_values(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i_b, C, o_C, m_C)
    end = tl.minimum(begin + BLOCK_S, S)
    o_image = i_b * S * C
    _write_rows(
        x_ptr + o_image, out_ptr + o_image, begin, end, C, o_C, m_C, mean_C, rstd_C, weight_C, bias_C, SILU, BLOCK_S, 1
    )


def group_norm_silu_fwd(
    x_BSC: torch.Tensor,
    shift_BC: torch.Tensor | None,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of x + shift: (out [B, S, C] in the dtype of x, mean less shift, 1 / deviation, channel mean less group mean).

    The statistics are fp32 [B, C], mean and deviation those of each channel's group; the last is empty without a shift.
    """
    x_BSC, weight_C, bias_C = x_BSC.contiguous(), weight_C.contiguous(), bias_C.contiguous()
    z, shifted = NormLayout.of(x_BSC, num_groups), shift_BC is not None
    out = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
    mean = torch.empty(z.images, z.channels, dtype=torch.float32, device=x_BSC.device)
    rstd = torch.empty_like(mean)
    offset = torch.empty((z.images, z.channels) if shifted else 0, dtype=torch.float32, device=x_BSC.device)
    shift = as_rows(shift_BC) if shift_BC is not None else mean
    stats = mean, rstd, offset if shifted else mean
    if z.whole:
        launch(
            group_norm_silu_fwd_kernel, z.whole_grid,
            x_BSC, shift, weight_C, bias_C, out, *stats, shift.stride(0), z.pixels, z.channels,
            EPS=eps, SILU=silu, SHIFT=shifted, **z.whole_options, **z.staged(STAGES),
        )  # fmt: skip
        return out, mean, rstd, offset
    chunk_mean = torch.empty(z.images, z.num_chunks, z.channels, dtype=torch.float32, device=x_BSC.device)
    chunk_m2 = torch.empty_like(chunk_mean)
    options = z.tile_options
    launch(
        group_norm_silu_stats_kernel, z.grid(z.num_chunks, options["BLOCK_C"]),
        x_BSC, chunk_mean, chunk_m2, z.pixels, z.chunk, z.channels, **options,
    )  # fmt: skip
    launch(
        group_norm_silu_merge_kernel, (z.images * num_groups,),
        chunk_mean, chunk_m2, shift, *stats, shift.stride(0), z.pixels, z.chunk, z.channels,
        EPS=eps, SHIFT=shifted, **z.merge_options,
    )  # fmt: skip
    launch(
        group_norm_silu_apply_kernel, z.grid(triton.cdiv(z.pixels, options["BLOCK_S"]), options["BLOCK_C"]),
        x_BSC, weight_C, bias_C, mean, rstd, out, z.pixels, z.channels, SILU=silu, **options,
    )  # fmt: skip
    return out, mean, rstd, offset
