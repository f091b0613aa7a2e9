"""`adafactor`: one step with factored second moments and no first one. Definition: `reference.adafactor`.

A group of matrices takes four launches after the two that decide on the step: the means of the columns, those of the
rows, one factor a matrix, and the update. Each mean is summed by one program in a fixed order, without atomics.
Letters: K chunks, M matrices of R rows and C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..reference.adafactor import EPS_1, LARGEST_RMS, Factored
from ..reference.adam import Hyper
from ..reference.weights import Weights
from .adam import (
    APPLIED_PLACE,
    BLOCK,
    C2_PLACE,
    FACTOR_PLACE,
    GRAD_TYPES,
    form_of,
    load_grad,
    load_weight,
    store_weight,
)

_BLOCK = tl.constexpr(BLOCK)
_EPS_1, _LARGEST_RMS = tl.constexpr(EPS_1), tl.constexpr(LARGEST_RMS)

COLUMNS, ROWS = 64, 4
"""Columns, and rows, whose means one program sums."""
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 32, 256
MEANS_AT_ONCE = 1024
NUM_WARPS = 4
"""Of every kernel here."""


@triton.jit
def _matrix(p_heads, p_matrices, i_m, GRAD: tl.constexpr, STEP: tl.constexpr):
    """(address of the gradient, R, C, index of the first row, of the first column, number) of the head i_m.

    C is a multiple of STEP. Sizes lie between 1 and 2^30, which the check of the compiled code sees.
    """
    p_grad = tl.multiple_of(tl.load(p_heads + 3 * i_m).to(tl.pointer_type(GRAD)), 16)
    number = tl.load(p_heads + 3 * i_m + 2) >> 32
    p_matrix = p_matrices + 6 * number
    num_rows = tl.minimum(tl.maximum(tl.load(p_matrix + 1), 1), 1 << 30).to(tl.int32)
    num_columns = tl.multiple_of(tl.minimum(tl.maximum(tl.load(p_matrix + 2), 1), 1 << 30).to(tl.int32), STEP)
    o_row, o_column = tl.multiple_of(tl.load(p_matrix + 3), 4), tl.multiple_of(tl.load(p_matrix + 4), 4)
    return p_grad, num_rows, num_columns, o_row, o_column, number


@triton.jit
def adafactor_columns_kernel(
    p_heads, p_matrices, p_column, p_control, beta_2, rest_2, GRAD: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """column = beta_2 column + (1 - beta_2) mean over the rows of g^2 + eps_1.

    Bytes: 4 an element, 2 in bf16, and 8 a column. 1. Shazeer and Stern, 2018, algorithm 4.
    """
    if tl.load(p_control + APPLIED_PLACE) > 0:
        p_grad, num_rows, num_columns, _, o_column, _ = _matrix(
            p_heads, p_matrices, tl.program_id(1).to(tl.int64), GRAD, STEP
        )
        if tl.program_id(0) * COLUMNS < num_columns:
            c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            m_c = c < num_columns
            # [ROWS, COLUMNS]
            total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for start in range(0, num_rows, ROWS):
                r = start + tl.arange(0, ROWS)
                i = r.to(tl.int64)[:, None] * num_columns + c
                g = tl.load(p_grad + i, mask=(r < num_rows)[:, None] & m_c, other=0.0).to(tl.float32)
                total += g * g
            factor = tl.load(p_control + FACTOR_PLACE)
            # [COLUMNS]
            mean = tl.sum(total, 0) / num_rows.to(tl.float32) * (factor * factor) + _EPS_1
            before = tl.load(p_column + o_column + c, mask=m_c, other=0.0)
            tl.store(p_column + o_column + c, beta_2 * before + rest_2 * mean, mask=m_c)


@triton.jit
def adafactor_rows_kernel(
    p_heads, p_matrices, p_row, p_column, p_share, p_control, beta_2, rest_2, GRAD: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """row = beta_2 row + (1 - beta_2) mean over the columns of g^2 + eps_1; share = sum of g^2 / column, over row.

    Bytes: 4 an element, 2 in bf16; 4 a column, 12 a row. 1. Shazeer and Stern, 2018, algorithm 4.
    """
    if tl.load(p_control + APPLIED_PLACE) > 0:
        p_grad, num_rows, num_columns, o_row, o_column, _ = _matrix(
            p_heads, p_matrices, tl.program_id(1).to(tl.int64), GRAD, STEP
        )
        if tl.program_id(0) * ROWS < num_rows:
            factor = tl.load(p_control + FACTOR_PLACE)
            r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            m_r = r < num_rows
            # [ROWS, COLUMNS]
            total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            weighed = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for start in range(0, num_columns, COLUMNS):
                c = start + tl.arange(0, COLUMNS)
                m_c = c < num_columns
                i = r.to(tl.int64)[:, None] * num_columns + c
                g = tl.load(p_grad + i, mask=m_r[:, None] & m_c, other=0.0).to(tl.float32) * factor
                column = tl.load(p_column + o_column + c, mask=m_c, other=1.0)
                total += g * g
                g *= tl.rsqrt(column)
                weighed += g * g
            # [ROWS]
            mean = tl.sum(total, 1) / num_columns.to(tl.float32) + _EPS_1
            row = beta_2 * tl.load(p_row + o_row + r, mask=m_r, other=0.0) + rest_2 * mean
            tl.store(p_row + o_row + r, row, mask=m_r)
            tl.store(p_share + o_row + r, tl.sum(weighed, 1) / row, mask=m_r)


@triton.jit
def adafactor_matrix_kernel(p_heads, p_matrices, p_row, p_share, p_scale, p_control, BLOCK: tl.constexpr):
    """scale = sqrt(c_2 mean(row)) / max(1, rms of the update), so that the update is g scale / sqrt(row column).

    Bytes: 8 a row. 1. Shazeer and Stern, 2018, algorithm 4.
    """
    if tl.load(p_control + APPLIED_PLACE) > 0:
        i_m = tl.program_id(0).to(tl.int64)
        _, num_rows, num_columns, o_row, _, number = _matrix(p_heads, p_matrices, i_m, tl.float32, 1)
        # [BLOCK]
        row = tl.zeros([BLOCK], dtype=tl.float32)
        share = tl.zeros([BLOCK], dtype=tl.float32)
        whole = tl.multiple_of((num_rows + 3) // 4 * 4, 4)  # padding of rows is 0
        for start in range(0, num_rows, BLOCK):
            r = start + tl.arange(0, BLOCK)
            m_r = r < whole
            row += tl.load(p_row + o_row + r, mask=m_r, other=0.0)
            share += tl.load(p_share + o_row + r, mask=m_r, other=0.0)
        mean = tl.sum(row, 0) / num_rows.to(tl.float32) * tl.load(p_control + C2_PLACE)
        square = mean * (tl.sum(share, 0) / num_rows.to(tl.float32) / num_columns.to(tl.float32))
        clip = _LARGEST_RMS / tl.maximum(tl.sqrt(square), _LARGEST_RMS)
        tl.store(p_scale + number, tl.sqrt(mean) * clip)


@triton.jit(do_not_specialize=["seed"])
def adafactor_kernel(
    p_param, p_low, p_row, p_column, p_matrices, p_scale, p_table, p_control, p_rate, p_step, seed,
    GRAD: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """p -= lr g scale / sqrt(row column).

    Bytes an element: 12 with fp32 weights and gradients, 6 with bf16 weights alone. Rows and columns lie in caches.
    1. Shazeer and Stern, 2018, algorithm 4.
    """
    if tl.load(p_control + APPLIED_PLACE) > 0:
        i_k = tl.program_id(0).to(tl.int64)
        g, o_k, num = load_grad(p_table, i_k, GRAD, _BLOCK)
        number = tl.load(p_table + 3 * i_k + 2) >> 32
        p_matrix = p_matrices + 6 * number
        num_columns = tl.minimum(tl.maximum(tl.load(p_matrix + 2), 1), 1 << 30).to(tl.int32)
        # [BLOCK]
        i = tl.arange(0, _BLOCK)
        inside = tl.minimum(tl.maximum(o_k - tl.load(p_matrix), 0), 1 << 30).to(tl.int32) + i
        row = tl.load(p_row + tl.load(p_matrix + 3) + inside // num_columns, mask=i < num, other=1.0)
        column = tl.load(p_column + tl.load(p_matrix + 4) + inside % num_columns, mask=i < num, other=1.0)
        u = g * (tl.load(p_control + FACTOR_PLACE) * tl.load(p_scale + number)) * tl.rsqrt(row) * tl.rsqrt(column)
        m_i = i < tl.multiple_of((num + 15) // 16 * 16, 16)  # padding is 0 and stays 0
        p = load_weight(p_param, p_low, o_k + i, m_i, FORM) - tl.load(p_rate) * u
        store_weight(p_param, p_low, o_k + i, m_i, p, seed, tl.load(p_step), FORM)


def adafactor_update(
    weights: Weights,
    moments: Factored,
    table_K3: torch.Tensor,
    heads_M3: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    grad_dtype: torch.dtype,
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """`reference.adafactor` in place; `table` and `heads` hold the addresses of the gradients, which share one dtype.

    table: from `adam_table` with the numbers of the matrices. heads: (address, offset, number << 32) of each gradient;
    more rows may follow. shapes: (R, C) of each gradient.
    """
    param, low, seed = weights
    row, column, matrices = moments
    grad, step_of = GRAD_TYPES[grad_dtype], math.gcd(8, *(num_columns for _, num_columns in shapes))
    most_rows, most_columns = (max(sizes) for sizes in zip(*shapes, strict=True))
    share, scale = torch.zeros_like(row), torch.empty(len(matrices), dtype=torch.float32, device=row.device)
    beta_2, num = (hyper.beta_2, 1 - hyper.beta_2), len(shapes)
    launch(
        adafactor_columns_kernel, (triton.cdiv(most_columns, COLUMNS), num), heads_M3, matrices, column, control,
        *beta_2, GRAD=grad, STEP=step_of, COLUMNS=COLUMNS, ROWS=ROWS_AT_ONCE, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        adafactor_rows_kernel, (triton.cdiv(most_rows, ROWS), num), heads_M3, matrices, row, column, share, control,
        *beta_2, GRAD=grad, STEP=step_of, ROWS=ROWS, COLUMNS=COLUMNS_AT_ONCE, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        adafactor_matrix_kernel, (num,), heads_M3, matrices, row, share, scale, control,
        BLOCK=MEANS_AT_ONCE, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        adafactor_kernel, (table_K3.shape[0],), param, param if low is None else low,
        row, column, matrices, scale, table_K3, control, rate, step, seed,
        GRAD=grad, FORM=form_of(weights), num_warps=NUM_WARPS,
    )  # fmt: skip
