"""Sums of relation rows by subject and by object: the transpose of the gathers `a[subject]` and `c[object]`.

It is the backward of `gather_add_relu` (through the relu) and of `triple_context` (without a relu).
Letters: N objects, E relations, D width.
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
    columns,
    head_rows,
    role_of,
    run_options,
    whole_chunks,
)


@triton.jit
def _add_rows(
    b_D, g_ptr, h_ptr, masked_ptr, slot_ptr, start, end, first, skip, as_subject, stride_g, stride_h, D, o_D, m_D,
    BLOCK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """b_D plus the rows of BLOCK positions from `start`; positions from `first` on lie `skip` further in slot."""
    o_M = start + tl.arange(0, BLOCK)
    m_M = o_M < end
    o_M = tl.where(o_M < first, o_M, o_M + skip)
    i_E = tl.load(slot_ptr + o_M, mask=m_M, other=0).to(tl.int64)[:, None]
    m_MD = m_M[:, None] & m_D[None, :]
    # [BLOCK, BLOCK_D]
    b_MD = tl.load(g_ptr + i_E * stride_g + o_D[None, :], mask=m_MD, other=0.0).to(tl.float32)
    if RELU:
        # [BLOCK, BLOCK_D]
        b_h = tl.load(h_ptr + i_E * stride_h + o_D[None, :], mask=m_MD, other=0.0)
        b_MD = tl.where(b_h <= 0, 0.0, b_MD)
        tl.store(masked_ptr + i_E * D + o_D[None, :], b_MD, mask=m_MD & as_subject)
    return b_D + tl.sum(b_MD, axis=0)


@triton.jit
def _sum_run(
    g_ptr, h_ptr, masked_ptr, slot_ptr, begin, end, first, skip, as_subject, stride_g, stride_h, D, o_D, m_D,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Sum of the rows slot[begin .. end] without the `skip` from `first`; the subject walk also stores g (h > 0).

    Most runs end within the first HEAD rows and never pay for a block of BLOCK_M.
    """
    b_D = tl.zeros([BLOCK_D], tl.float32)
    end -= skip
    if HEAD > 0:  # noqa: SIM102 - HEAD is known to the compiler, the run is not
        if begin < end:
            b_D = _add_rows(
                b_D, g_ptr, h_ptr, masked_ptr, slot_ptr, begin, end, first, skip, as_subject, stride_g, stride_h,
                D, o_D, m_D, HEAD, RELU,
            )  # fmt: skip
    for start in range(begin + HEAD, end, BLOCK_M):
        b_D = _add_rows(
            b_D, g_ptr, h_ptr, masked_ptr, slot_ptr, start, end, first, skip, as_subject, stride_g, stride_h,
            D, o_D, m_D, BLOCK_M, RELU,
        )  # fmt: skip
    return b_D


@triton.jit(do_not_specialize=["chunk"])
def role_sums_hub_kernel(
    g_ptr, h_ptr, masked_ptr, partial_ptr, subject_ptr, object_ptr, ptr_ptr, mid_ptr, slot_ptr,
    stride_g, stride_h, chunk, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """partial[p] = sum of g (h > 0) over the messages of chunk p if they belong to one run; otherwise not written.

    `role_sums_kernel` does not read the summed rows again. Other chunks cost five 4-byte loads.
    """
    i_p, o_D, m_D = columns(D, BLOCK_D)
    begin = i_p * chunk
    as_subject, run_end = role_of(begin, slot_ptr, subject_ptr, object_ptr, ptr_ptr, mid_ptr)
    if begin + chunk <= run_end:
        b_D = _sum_run(
            g_ptr, h_ptr, masked_ptr, slot_ptr, begin, begin + chunk, begin + chunk, 0, as_subject,
            stride_g, stride_h, D, o_D, m_D, 0, BLOCK_M, BLOCK_D, RELU,
        )  # fmt: skip
        tl.store(partial_ptr + i_p.to(tl.int64) * D + o_D, b_D, mask=m_D)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program", "chunk"])
def role_sums_kernel(
    g_ptr, h_ptr, masked_ptr, partial_ptr, subject_sum_ptr, object_sum_ptr, program_sum_ptr, ptr_ptr, mid_ptr, slot_ptr,
    stride_g, stride_h, stride_sum, chunk, num_rows, rows_per_program, D,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """subject_sum[i] = sum of g' over subject(e) = i, object_sum[i] = sum over object(e) = i, g' = g (h > 0) [1].

    Every relation has one subject, so the subject walk visits each relation once. It stores g' (the gradient of b),
    and its sums add up to the bias gradient (one fp32 row a program, added by `column_sum`).
    Bytes an element of [E, D] at bf16: 6 (g and h read, g' written, once each from memory: the minimum). The object
    walk reads g and h again from L2, because a graph's relations are neighbours. Without relu: 2 (g read once).

    [1] SGG-IG (Wang et al., AAAI-25), eqs 3-4, 6 and 7, transposed.
    """
    i_p, o_D, m_D = columns(D, BLOCK_D)
    b_program = tl.zeros([BLOCK_D], tl.float32)
    first_row = i_p * rows_per_program
    for i_row in range(0, tl.minimum(rows_per_program, num_rows - first_row)):
        i_n = first_row + i_row
        mid = tl.load(mid_ptr + i_n)
        for i_role in tl.static_range(2):
            begin = tl.load(ptr_ptr + i_n) if i_role == 0 else mid
            end = mid if i_role == 0 else tl.load(ptr_ptr + i_n + 1)
            first, skip = whole_chunks(begin, end, chunk, SPLIT)
            b_D = _sum_run(
                g_ptr, h_ptr, masked_ptr, slot_ptr, begin, end, first, skip, i_role == 0,
                stride_g, stride_h, D, o_D, m_D, HEAD, BLOCK_M, BLOCK_D, RELU,
            )  # fmt: skip
            b_D = add_partials(b_D, partial_ptr, first, skip, chunk, D, o_D, m_D, BLOCK_M, SPLIT)
            sum_ptr = subject_sum_ptr if i_role == 0 else object_sum_ptr
            tl.store(sum_ptr + i_n.to(tl.int64) * stride_sum + o_D, b_D, mask=m_D)
            if i_role == 0:
                b_program += b_D
    tl.store(program_sum_ptr + i_p.to(tl.int64) * D + o_D, b_program, mask=m_D)


def role_sums(
    g_ED: torch.Tensor,
    h_ED: torch.Tensor | None,
    subject_sum_ND: torch.Tensor,
    object_sum_ND: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    ptr_N1: torch.Tensor,
    mid_N: torch.Tensor,
    slot_2E: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Fill the two sums of `g * (h > 0)`, or of g if h is None; both outputs share one row stride.

    Returns the product [E, D] (None without h), and [programs, D] fp32 rows that add up to its column sums.
    """
    g_ED = as_rows(g_ED)
    num_rows, width, num_messages = len(mid_N), g_ED.shape[1], len(slot_2E)
    relu = h_ED is not None
    h_ED = as_rows(h_ED) if h_ED is not None else g_ED
    masked_ED = torch.empty(g_ED.shape, dtype=g_ED.dtype, device=g_ED.device) if relu else g_ED
    chunk = chunk_size(num_messages)
    partial = chunk_partials(num_messages, chunk, width, g_ED)
    rows_per_program = max(1, triton.cdiv(num_rows, MAX_PARTIALS))
    num_programs = triton.cdiv(num_rows, rows_per_program)
    program_sum = torch.empty(num_programs, width, dtype=torch.float32, device=g_ED.device)
    options = run_options(num_rows, width, g_ED.element_size())
    num_d = triton.cdiv(width, options["BLOCK_D"])
    launch(
        role_sums_hub_kernel, (len(partial) * num_d,),
        g_ED, h_ED, masked_ED, partial, subject_E, object_E, ptr_N1, mid_N, slot_2E,
        g_ED.stride(0), h_ED.stride(0), chunk, width,
        RELU=relu, **options,
    )  # fmt: skip
    launch(
        role_sums_kernel, (num_programs * num_d,),
        g_ED, h_ED, masked_ED, partial, subject_sum_ND, object_sum_ND, program_sum, ptr_N1, mid_N, slot_2E,
        g_ED.stride(0), h_ED.stride(0), subject_sum_ND.stride(0), chunk, num_rows, rows_per_program, width,
        RELU=relu, HEAD=head_rows(options), SPLIT=chunk > 0, **options,
    )  # fmt: skip
    return (masked_ED if relu else None), program_sum
