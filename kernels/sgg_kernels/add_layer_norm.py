"""A residual sum and the LayerNorm behind it, each way in one pass. Letters: R rows, D width, P programs.

A transformer block adds a layer's result to its stream and normalises the sum for the next layer. In backward two
gradients meet there: the norm's and the stream's. The same kernel adds them, and sums the columns for the gradients of
the norm's weight and bias and of the bias of the linear map before it (`late`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

MAX_WIDTH = 8192
"""Most columns: a row lies in the registers of one program."""

TILE = 2048
"""Elements of a backward tile, 16 a lane of four warps."""

MAX_PROGRAMS = 256
"""Most backward programs, each of which writes a row of partial column sums."""


@triton.jit(do_not_specialize=["num_rows"])
def add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, late_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, mean_ptr, rstd_ptr, num_rows, D,
    EPS: tl.constexpr, RESIDUAL: tl.constexpr, LATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum = x + residual + late, rounded; out = layer_norm(sum) [1]; a row a program.

    Bytes an element at bf16: x, residual read, sum, out written (8). Eager reads the sum again (10).

    [1] Ba, Kiros & Hinton, Layer normalization (2016).
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_D = tl.arange(0, BLOCK_D)
    m_D = o_D < D
    # [BLOCK_D] each
    b_x = tl.load(x_ptr + i_r * D + o_D, mask=m_D, other=0.0).to(tl.float32)
    if RESIDUAL:
        b_x += tl.load(residual_ptr + i_r * D + o_D, mask=m_D, other=0.0).to(tl.float32)
    if LATE:
        b_x += tl.load(late_ptr + o_D, mask=m_D, other=0.0).to(tl.float32)
    if RESIDUAL or LATE:
        b_sum = b_x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + i_r * D + o_D, b_sum, mask=m_D)
        b_x = b_sum.to(tl.float32)
    mean = tl.sum(b_x, axis=0) / D
    b_off = tl.where(m_D, b_x - mean, 0.0)
    # The sum above is rounded relative to the mean; the smaller deviations correct it.
    more = tl.sum(b_off, axis=0) / D
    b_off = tl.where(m_D, b_off - more, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_off * b_off, axis=0) / D + EPS)
    b_weight = tl.load(weight_ptr + o_D, mask=m_D, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_D, mask=m_D, other=0.0).to(tl.float32)
    tl.store(out_ptr + i_r * D + o_D, b_off * rstd * b_weight + b_bias, mask=m_D)
    tl.store(mean_ptr + i_r, mean + more)
    tl.store(rstd_ptr + i_r, rstd)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def add_layer_norm_bwd_kernel(
    grad_ptr, grad_sum_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    num_rows, rows_per_program, D,
    ADD: tl.constexpr, LATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad x = grad sum + rstd (g weight - mean(g weight) - xhat mean(g weight xhat)), of x, residual and sum alike.

    partial[p] = column sums of (g xhat | g | grad x with LATE) over the program's rows, the first stage of the
    gradients of weight, bias and late. Bytes an element at bf16: 8 (grad, grad sum, sum read, grad x written). Eager
    reads grad twice, writes and reads the norm's gradient for the sum of the two, and reads that for late: 16.
    """
    i_p = tl.program_id(0)
    o_D = tl.arange(0, BLOCK_D)
    m_D = o_D < D
    b_weight = tl.load(weight_ptr + o_D, mask=m_D, other=0.0).to(tl.float32)
    b_of_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_of_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_of_late = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(i_p * rows_per_program, tl.minimum((i_p + 1) * rows_per_program, num_rows), BLOCK_R):
        o_R = start + tl.arange(0, BLOCK_R)
        m_R = o_R < num_rows
        m_RD = m_R[:, None] & m_D[None, :]
        o_RD = o_R.to(tl.int64)[:, None] * D + o_D[None, :]
        mean_R = tl.load(mean_ptr + o_R, mask=m_R, other=0.0)
        rstd_R = tl.load(rstd_ptr + o_R, mask=m_R, other=0.0)
        # [BLOCK_R, BLOCK_D] each
        b_hat = tl.load(sum_ptr + o_RD, mask=m_RD, other=0.0).to(tl.float32)
        b_g = tl.load(grad_ptr + o_RD, mask=m_RD, other=0.0).to(tl.float32)
        b_hat = tl.where(m_RD, (b_hat - mean_R[:, None]) * rstd_R[:, None], 0.0)
        b_of_weight += b_g * b_hat
        b_of_bias += b_g
        b_g *= b_weight[None, :]
        mean_g = tl.sum(b_g, axis=1) / D
        slope = tl.sum(b_g * b_hat, axis=1) / D
        b_g = rstd_R[:, None] * (b_g - mean_g[:, None] - b_hat * slope[:, None])
        if ADD:
            b_g += tl.load(grad_sum_ptr + o_RD, mask=m_RD, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + o_RD, b_g, mask=m_RD)
        if LATE:
            b_of_late += tl.where(m_RD, b_g, 0.0)
    p_out = partial_ptr + i_p.to(tl.int64) * (3 if LATE else 2) * D + o_D
    tl.store(p_out, tl.sum(b_of_weight, axis=0), mask=m_D)
    tl.store(p_out + D, tl.sum(b_of_bias, axis=0), mask=m_D)
    if LATE:
        tl.store(p_out + 2 * D, tl.sum(b_of_late, axis=0), mask=m_D)


def _block(width: int) -> int:
    return max(1, triton.next_power_of_2(width))


def programs_of(num_rows: int, width: int) -> tuple[int, int]:
    """(programs, rows of a program) of the backward: two tiles at least, for one row of partial sums."""
    rows = max(1, TILE // _block(width))
    rows_per_program = triton.cdiv(max(2 * rows, triton.cdiv(num_rows, MAX_PROGRAMS)), rows) * rows
    return triton.cdiv(num_rows, rows_per_program), rows_per_program


def add_layer_norm_fwd(
    x_RD: torch.Tensor,
    residual_RD: torch.Tensor | None,
    late_D: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, sum [R, D] in the dtype of x, mean, 1 / deviation fp32 [R]); without residual and late the sum is empty.

    The residual has the dtype of x.
    """
    x_RD, weight_D, bias_D = x_RD.contiguous(), weight_D.contiguous(), bias_D.contiguous()
    num_rows, width = x_RD.shape
    has_residual, has_late = residual_RD is not None, late_D is not None
    out = torch.empty(num_rows, width, dtype=x_RD.dtype, device=x_RD.device)
    total = torch.empty(x_RD.shape if has_residual or has_late else 0, dtype=x_RD.dtype, device=x_RD.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x_RD.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x_RD.device)
    residual = residual_RD.contiguous() if residual_RD is not None else x_RD
    late = late_D.contiguous() if late_D is not None else bias_D
    block = _block(width)
    launch(
        add_layer_norm_fwd_kernel, (num_rows,),
        x_RD, residual, late, weight_D, bias_D, total if has_residual or has_late else out, out, mean, rstd,
        num_rows, width, EPS=eps, RESIDUAL=has_residual, LATE=has_late, BLOCK_D=block, num_warps=max(1, block // 512),
    )  # fmt: skip
    return out, total, mean, rstd


def add_layer_norm_bwd(
    grad_RD: torch.Tensor,
    grad_sum_RD: torch.Tensor | None,
    sum_RD: torch.Tensor,
    weight_D: torch.Tensor,
    mean_R: torch.Tensor,
    rstd_R: torch.Tensor,
    late: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the gradient of x [R, D], partial column sums fp32 [P, 2D], with `late` [P, 3D])."""
    grad_RD, sum_RD, weight_D = grad_RD.contiguous(), sum_RD.contiguous(), weight_D.contiguous()
    added = grad_sum_RD.contiguous() if grad_sum_RD is not None else grad_RD
    num_rows, width = sum_RD.shape
    grad_x = torch.empty(num_rows, width, dtype=sum_RD.dtype, device=sum_RD.device)
    block = _block(width)
    rows = max(1, TILE // block)
    num_programs, rows_per_program = programs_of(num_rows, width)
    partial = torch.empty(num_programs, (3 if late else 2) * width, dtype=torch.float32, device=sum_RD.device)
    launch(
        add_layer_norm_bwd_kernel, (num_programs,),
        grad_RD, added, sum_RD, weight_D, mean_R, rstd_R, grad_x, partial, num_rows, rows_per_program, width,
        ADD=grad_sum_RD is not None, LATE=late, BLOCK_R=rows, BLOCK_D=block, num_warps=max(1, rows * block // 512),
    )  # fmt: skip
    return grad_x, partial
