"""Message passing of a triple convolution after its second GEMM: bias, relu, split, mean over each object's messages.

This kernel adds the bias, not the GEMM's epilogue. The bias costs no bytes in either, and here the kernel that writes
the gradient of y also gives the gradient of the bias, which saves `nn.Linear`'s own pass over [E, 3D]. It also adds
the residual of the relations, because r' is in registers. Letters: N objects, E relations, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .segments import (
    MAX_PARTIALS,
    add_partials,
    as_rows,
    chunk_partials,
    chunk_size,
    column_sum,
    columns,
    head_rows,
    role_of,
    run_options,
    tile_options,
    whole_chunks,
)

ROWS = 8
"""Fewest rows of a backward program; each program writes one row of partial bias sums."""


@triton.jit
def _relu_third(y_ptr, bias_ptr, i_E, stride_y, o_col, m_D, m_MD):
    """relu(y + bias) of one third of the columns, fp32 [BLOCK_M, BLOCK_D]."""
    b_MD = tl.load(y_ptr + i_E * stride_y + o_col[None, :], mask=m_MD, other=0.0).to(tl.float32)
    b_MD += tl.load(bias_ptr + o_col, mask=m_D, other=0.0).to(tl.float32)[None, :]
    return tl.where(b_MD <= 0, 0.0, b_MD)  # not tl.maximum: a NaN must stay NaN


@triton.jit
def _add_rows(
    b_D, y_ptr, bias_ptr, residual_ptr, r_ptr, slot_ptr, start, end, first, skip, as_subject, stride_y,
    stride_residual, D, o_D, m_D,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """b_D plus the messages of BLOCK positions from `start`; positions from `first` on lie `skip` further in slot."""
    o_message = tl.where(as_subject, 0, 2 * D) + o_D
    o_M = start + tl.arange(0, BLOCK)
    m_M = o_M < end
    o_M = tl.where(o_M < first, o_M, o_M + skip)
    i_E = tl.load(slot_ptr + o_M, mask=m_M, other=0).to(tl.int64)[:, None]
    m_MD = m_M[:, None] & m_D[None, :]
    b_message = _relu_third(y_ptr, bias_ptr, i_E, stride_y, o_message, m_D, m_MD)
    if as_subject:
        b_r = _relu_third(y_ptr, bias_ptr, i_E, stride_y, D + o_D, m_D, m_MD)
        if RESIDUAL:
            # [BLOCK, BLOCK_D]
            b_r += tl.load(residual_ptr + i_E * stride_residual + o_D[None, :], mask=m_MD, other=0.0).to(tl.float32)
        tl.store(r_ptr + i_E * D + o_D[None, :], b_r, mask=m_MD)
    return b_D + tl.sum(tl.where(m_MD, b_message, 0.0), axis=0)


@triton.jit
def _sum_run(
    y_ptr, bias_ptr, residual_ptr, r_ptr, slot_ptr, begin, end, first, skip, as_subject, stride_y, stride_residual,
    D, o_D, m_D,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sum of the messages slot[begin .. end] without the `skip` from `first`; the subject walk also stores r.

    Most runs end within the first HEAD rows and never pay for a block of BLOCK_M.
    """
    b_D = tl.zeros([BLOCK_D], tl.float32)
    end -= skip
    if HEAD > 0:  # noqa: SIM102 - HEAD is known to the compiler, the run is not
        if begin < end:
            b_D = _add_rows(
                b_D, y_ptr, bias_ptr, residual_ptr, r_ptr, slot_ptr, begin, end, first, skip, as_subject, stride_y,
                stride_residual, D, o_D, m_D, HEAD, RESIDUAL,
            )  # fmt: skip
    for start in range(begin + HEAD, end, BLOCK_M):
        b_D = _add_rows(
            b_D, y_ptr, bias_ptr, residual_ptr, r_ptr, slot_ptr, start, end, first, skip, as_subject, stride_y,
            stride_residual, D, o_D, m_D, BLOCK_M, RESIDUAL,
        )  # fmt: skip
    return b_D


@triton.jit(do_not_specialize=["chunk"])
def scatter_mean_fwd_hub_kernel(
    y_ptr, bias_ptr, residual_ptr, r_ptr, partial_ptr, subject_ptr, object_ptr, ptr_ptr, mid_ptr, slot_ptr,
    stride_y, stride_residual, chunk, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """partial[p] = sum of the messages of chunk p if they belong to one run; otherwise not written.

    `scatter_mean_fwd_kernel` does not read the summed rows again. Other chunks cost five 4-byte loads.
    """
    i_p, o_D, m_D = columns(D, BLOCK_D)
    if RESIDUAL and residual_ptr.dtype.element_ty == tl.float32 and y_ptr.dtype.element_ty != tl.float32:
        # Four columns a lane: with the eight of narrow rows a request of the residual would use half of its sectors.
        # Written out, for the compiler takes the hint on an expression of this function only.
        o_D = tl.max_contiguous(tl.program_id(0) % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D), 4)
    begin = i_p * chunk
    as_subject, run_end = role_of(begin, slot_ptr, subject_ptr, object_ptr, ptr_ptr, mid_ptr)
    if begin + chunk <= run_end:
        b_D = _sum_run(
            y_ptr, bias_ptr, residual_ptr, r_ptr, slot_ptr, begin, begin + chunk, begin + chunk, 0, as_subject,
            stride_y, stride_residual, D, o_D, m_D, 0, BLOCK_M, BLOCK_D, RESIDUAL,
        )  # fmt: skip
        tl.store(partial_ptr + i_p.to(tl.int64) * D + o_D, b_D, mask=m_D)


@triton.jit(do_not_specialize=["chunk"])
def scatter_mean_fwd_kernel(
    y_ptr, bias_ptr, residual_ptr, mean_ptr, r_ptr, partial_ptr, ptr_ptr, mid_ptr, slot_ptr,
    stride_y, stride_residual, chunk, D,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """m_s | r' | m_o = relu(y + bias); mean[i] = mean of m_s where subject = i and m_o where object = i; r = r' [1].

    With RESIDUAL r = residual + r'. A relation has one subject, so the subject walk visits each once and writes r.
    Bytes an element of [E, D] at bf16: y read once (6), r written (2), mean 2 N / E, residual 2. This is the minimum:
    exactly one program reads each third of a row of y.

    [1] SGG-IG (Wang et al., AAAI-25), eqs 3-6, index sets as in sg2im (Johnson et al., CVPR 2018).
    """
    i_n, o_D, m_D = columns(D, BLOCK_D)
    if RESIDUAL and residual_ptr.dtype.element_ty == tl.float32 and y_ptr.dtype.element_ty != tl.float32:
        # Four columns a lane: with the eight of narrow rows a request of the residual would use half of its sectors.
        o_D = tl.max_contiguous(tl.program_id(0) % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D), 4)
    row_begin, mid, row_end = tl.load(ptr_ptr + i_n), tl.load(mid_ptr + i_n), tl.load(ptr_ptr + i_n + 1)
    b_D = tl.zeros([BLOCK_D], tl.float32)
    for i_role in tl.static_range(2):
        begin = row_begin if i_role == 0 else mid
        end = mid if i_role == 0 else row_end
        first, skip = whole_chunks(begin, end, chunk, SPLIT)
        b_D += _sum_run(
            y_ptr, bias_ptr, residual_ptr, r_ptr, slot_ptr, begin, end, first, skip, i_role == 0,
            stride_y, stride_residual, D, o_D, m_D, HEAD, BLOCK_M, BLOCK_D, RESIDUAL,
        )  # fmt: skip
        b_D = add_partials(b_D, partial_ptr, first, skip, chunk, D, o_D, m_D, BLOCK_M, SPLIT)
    b_D /= tl.maximum(row_end - row_begin, 1).to(tl.float32)
    tl.store(mean_ptr + i_n.to(tl.int64) * D + o_D, b_D, mask=m_D)


def scatter_mean_fwd(
    y_E3D: torch.Tensor,
    bias_3D: torch.Tensor,
    residual_ED: torch.Tensor | None,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    ptr_N1: torch.Tensor,
    mid_N: torch.Tensor,
    slot_2E: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [N, D] in the dtype of y, r [E, D] in the wider of y's and the residual's). y: [E, 3D], any row stride."""
    y_E3D, bias_3D = as_rows(y_E3D), bias_3D.contiguous()
    num_rows, num_relations, width = len(mid_N), y_E3D.shape[0], y_E3D.shape[1] // 3
    has_residual = residual_ED is not None
    residual_ED = as_rows(residual_ED) if residual_ED is not None else y_E3D
    mean_ND = torch.empty(num_rows, width, dtype=y_E3D.dtype, device=y_E3D.device)
    r_dtype = torch.promote_types(y_E3D.dtype, residual_ED.dtype)
    r_ED = torch.empty(num_relations, width, dtype=r_dtype, device=y_E3D.device)
    chunk = chunk_size(2 * num_relations)
    partial = chunk_partials(2 * num_relations, chunk, width, y_E3D)
    options = run_options(
        num_rows, width, y_E3D.element_size(), has_residual and residual_ED.dtype == torch.float32
    ) | {"RESIDUAL": has_residual}
    num_d = triton.cdiv(width, options["BLOCK_D"])
    launch(
        scatter_mean_fwd_hub_kernel, (len(partial) * num_d,),
        y_E3D, bias_3D, residual_ED, r_ED, partial, subject_E, object_E, ptr_N1, mid_N, slot_2E,
        y_E3D.stride(0), residual_ED.stride(0), chunk, width,
        **options,
    )  # fmt: skip
    launch(
        scatter_mean_fwd_kernel, (num_rows * num_d,),
        y_E3D, bias_3D, residual_ED, mean_ND, r_ED, partial, ptr_N1, mid_N, slot_2E,
        y_E3D.stride(0), residual_ED.stride(0), chunk, width,
        HEAD=head_rows(options), SPLIT=chunk > 0, **options,
    )  # fmt: skip
    return mean_ND, r_ED


@triton.jit(do_not_specialize=["num_relations", "rows_per_program"])
def scatter_mean_bwd_kernel(
    grad_mean_ptr, grad_r_ptr, y_ptr, bias_ptr, grad_y_ptr, partial_ptr, subject_ptr, object_ptr, ptr_ptr,
    stride_mean, stride_r, stride_y, num_relations, rows_per_program, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_y[e] = [g_mean[s] / deg(s) | g_r[e] | g_mean[o] / deg(o)] where y + bias > 0, else 0; a third a program.

    Each program also writes the fp32 column sums of its rows, the first stage of the bias gradient.
    Bytes an element of [E, D] at bf16: y read (6), g_r read (2), grad_y written (6), g_mean 2 N / E from L2: the
    minimum while y is kept. (One bit an element instead of y would save 5.6 of 14 here, and add 0.4 in forward.)
    """
    num_d = tl.cdiv(D, BLOCK_D)
    i_p = tl.program_id(0) // (3 * num_d)
    i_third = tl.program_id(0) % (3 * num_d) // num_d
    o_D = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if grad_r_ptr.dtype.element_ty == tl.float32 and y_ptr.dtype.element_ty != tl.float32:
        o_D = tl.max_contiguous(o_D, 4)  # whole sectors of grad r, as in forward
    m_D = o_D < D
    o_col = i_third * D + o_D
    b_bias = tl.load(bias_ptr + o_col, mask=m_D, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(i_p * rows_per_program, tl.minimum((i_p + 1) * rows_per_program, num_relations), BLOCK_E):
        o_E = start + tl.arange(0, BLOCK_E)
        m_E = o_E < num_relations
        m_ED = m_E[:, None] & m_D[None, :]
        i_e = o_E.to(tl.int64)[:, None]
        if i_third == 1:
            # [BLOCK_E, BLOCK_D]
            b_g = tl.load(grad_r_ptr + i_e * stride_r + o_D[None, :], mask=m_ED, other=0.0).to(tl.float32)
        else:
            if i_third == 0:
                i_n = tl.load(subject_ptr + o_E, mask=m_E, other=0)
            else:
                i_n = tl.load(object_ptr + o_E, mask=m_E, other=0)
            degree = tl.load(ptr_ptr + i_n + 1, mask=m_E, other=1) - tl.load(ptr_ptr + i_n, mask=m_E, other=0)
            i_n = i_n.to(tl.int64)[:, None]
            # [BLOCK_E, BLOCK_D]
            b_g = tl.load(grad_mean_ptr + i_n * stride_mean + o_D[None, :], mask=m_ED, other=0.0).to(tl.float32)
            b_g *= (1.0 / degree.to(tl.float32))[:, None]
        # [BLOCK_E, BLOCK_D]
        b_y = tl.load(y_ptr + i_e * stride_y + o_col[None, :], mask=m_ED, other=0.0).to(tl.float32)
        b_g = tl.where(b_y + b_bias[None, :] <= 0, 0.0, b_g)
        tl.store(grad_y_ptr + i_e * (3 * D) + o_col[None, :], b_g, mask=m_ED)
        b_sum += tl.sum(b_g, axis=0)
    tl.store(partial_ptr + i_p.to(tl.int64) * (3 * D) + o_col, b_sum, mask=m_D)


def scatter_mean_bwd(
    grad_mean_ND: torch.Tensor,
    grad_r_ED: torch.Tensor,
    y_E3D: torch.Tensor,
    bias_3D: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    ptr_N1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad y [E, 3D], grad bias [3D]); the residual's gradient is `grad_r` itself."""
    grad_mean_ND, grad_r_ED, y_E3D = as_rows(grad_mean_ND), as_rows(grad_r_ED), as_rows(y_E3D)
    bias_3D = bias_3D.contiguous()
    num_relations, width = grad_r_ED.shape
    grad_y = torch.empty(num_relations, 3 * width, dtype=y_E3D.dtype, device=y_E3D.device)
    options = tile_options(num_relations, width, y_E3D.element_size())
    rows_per_program = triton.cdiv(max(ROWS, triton.cdiv(num_relations, MAX_PARTIALS)), ROWS) * ROWS
    num_programs = triton.cdiv(num_relations, rows_per_program)
    partial = torch.empty(num_programs, 3 * width, dtype=torch.float32, device=y_E3D.device)
    launch(
        scatter_mean_bwd_kernel, (num_programs * 3 * triton.cdiv(width, options["BLOCK_D"]),),
        grad_mean_ND, grad_r_ED, y_E3D, bias_3D, grad_y, partial, subject_E, object_E, ptr_N1,
        grad_mean_ND.stride(0), grad_r_ED.stride(0), y_E3D.stride(0), num_relations, rows_per_program, width,
        **options,
    )  # fmt: skip
    return grad_y, column_sum(partial, bias_3D.dtype)
