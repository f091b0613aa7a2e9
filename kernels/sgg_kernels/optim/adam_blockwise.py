"""`adam_blockwise`: one Adam step of flat weights whose moments are codes of 8 or 4 bits: `reference.adam_blockwise`.

A group of parameters takes one launch, after the two launches of `adam.py` that decide on the step. Dettmers' kernels
find a code by bisection, with some 11 loads a moment; these kernels compute it.
Letters: P elements of the flat buffers, R blocks of SIZE elements with one scale each, K chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..reference.adam import Hyper
from ..reference.adam_blockwise import BLOCKS, DECADES, LEAST_SCALE, ZERO_1, Moments, dynamic_map, middles
from ..reference.weights import Weights
from .adam import (
    APPLIED_PLACE,
    BLOCK,
    C1_PLACE,
    C2_PLACE,
    FACTOR_PLACE,
    GRAD_TYPES,
    form_of,
    load_grad,
    load_weight,
    store_weight,
)

_BLOCK, _LEAST_SCALE, _DECADES = tl.constexpr(BLOCK), tl.constexpr(LEAST_SCALE), tl.constexpr(DECADES[8])
_ZERO_8, _ZERO_4 = tl.constexpr(ZERO_1[8]), tl.constexpr(ZERO_1[4])
_LEVELS_4 = tl.constexpr(tuple(middles(dynamic_map(True, 4)).tolist()[ZERO_1[4] :]))
"""Middles between the values 0 .. 1 of the signed map of 4 bits."""


def _lines(first: int) -> tuple[tuple[float, float], ...]:
    """(slope, intercept) of the map x -> level for each decade d, which has `first 2^d` parts.

    Parts are numbered across decades: decade d holds the levels from first 2^d to first 2^(d + 1). Within a decade the
    level is linear in x. The slopes fall from decade to decade, so the level is the least of all lines.
    """
    made = []
    for decade in range(DECADES[8]):
        parts, unit = first * 2**decade, 10.0 ** (decade + 1 - DECADES[8])
        made.append((parts / (0.9 * unit), parts * 0.8 / 0.9))
    # The lowest part ends half way to 0; `_code` needs a fifth of a part there.
    unit, centre, end = 10.0 ** (1 - DECADES[8]), 0.1 + 0.45 / first, 0.1 + 0.9 / first
    slope = 0.8 / (end - centre / 2)
    made[0] = (slope / unit, first + 1 - slope * end)
    return tuple(made)


_LINES_1, _LINES_2 = tl.constexpr(_lines(1)), tl.constexpr(_lines(2))


@triton.jit
def _code(x, LINES: tl.constexpr, TOP: tl.constexpr):
    """Index of the map's value nearest to x (0 to 1), counted from the value 0. TOP is the index of the value 1.

    The middle between two centres of one decade is the edge of their parts. The middle between two decades lies a fifth
    into the first part of the upper decade: n parts of 0.9 / n start at 0.1, the first centre is 0.1 + 0.45 / n, the
    last centre below 0.1 is 0.1 (1 - 0.9 / n), and half of 0.45 - 0.09 is a fifth of 0.9. This holds for every decade.
    The middle between the last centre and 1 is a quarter of a part below 1.
    """
    level = x * LINES[0][0] + LINES[0][1]
    for d in tl.static_range(1, _DECADES):
        level = tl.minimum(level, x * LINES[d][0] + LINES[d][1])
    code = level.to(tl.int32)
    first_of_decade = (code & (code - 1)) == 0
    code = tl.where(first_of_decade, (level - 0.2).to(tl.int32), code)
    return tl.where(level >= TOP - 0.25, TOP, code)


@triton.jit
def load_codes(p_code, o, num, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes int32 [BLOCK] from element o on; 0 from `num` on, a multiple of 16. Bytes an element: 1, or 1/2."""
    if BITS == 8:
        i = tl.arange(0, BLOCK)
        code = tl.load(p_code + (o + i), mask=i < num, other=0).to(tl.int32)
    else:
        # [BLOCK / 2]
        i = tl.arange(0, BLOCK // 2)
        byte = tl.load(p_code + (o // 2 + i), mask=i < num // 2, other=0).to(tl.int32)
        code = tl.reshape(tl.join(byte >> 4, byte & 15), [BLOCK])
    return code


@triton.jit
def store_codes(p_code, o, num, code, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `load_codes` reads, from integers [BLOCK]."""
    if BITS == 8:
        i = tl.arange(0, BLOCK)
        tl.store(p_code + (o + i), code.to(tl.uint8), mask=i < num)
    else:
        high, low = tl.split(tl.reshape(code, [BLOCK // 2, 2]))
        i = tl.arange(0, BLOCK // 2)
        tl.store(p_code + (o // 2 + i), ((high << 4) | low).to(tl.uint8), mask=i < num // 2)


@triton.jit
def encode_signed(m_RS, BITS: tl.constexpr):
    """(codes of the signed map int32 [R, S], scales [R])."""
    absmax = tl.max(tl.abs(m_RS), 1)
    inverse = tl.where(absmax < _LEAST_SCALE, 0.0, 1 / tl.maximum(absmax, _LEAST_SCALE))
    x = tl.abs(m_RS) * inverse[:, None]
    if BITS == 8:
        size = _code(x, _LINES_1, 128)
        code = _ZERO_8 + tl.where(m_RS < 0, -tl.minimum(size, 127), size)
    else:
        size = (x > _LEVELS_4[0]).to(tl.int32)
        for k in tl.static_range(1, 8):
            size += (x > _LEVELS_4[k]).to(tl.int32)
        code = _ZERO_4 + tl.where(m_RS < 0, -tl.minimum(size, 7), size)
    return code, absmax


@triton.jit
def _encode_unsigned(v_RS, BITS: tl.constexpr):
    """(codes of the unsigned map int32 [R, S], scales [R])."""
    absmax = tl.max(v_RS, 1)
    inverse = tl.where(absmax < _LEAST_SCALE, 0.0, 1 / tl.maximum(absmax, _LEAST_SCALE))
    x = v_RS * inverse[:, None]
    if BITS == 8:
        code = tl.maximum(_code(x, _LINES_2, 256) - 1, (v_RS > 0).to(tl.int32))
    else:
        code = tl.minimum(tl.maximum(x * 16 - 0.5, 0.0).to(tl.int32), 15)
    return code, absmax


@triton.jit(do_not_specialize=["seed"])
def adam_blockwise_kernel(
    p_param, p_low, p_code_1, p_code_2, p_absmax_1, p_absmax_2, p_map_1, p_map_2, p_table, p_control, p_rate, p_step,
    seed, beta_1, rest_1, beta_2, rest_2, eps, GRAD: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """m = beta_1 m + (1 - beta_1) g; v = beta_2 v + (1 - beta_2) g^2; p -= lr / c_1 m / (sqrt(v / c_2) + eps).

    g is scaled first; rest = 1 - beta. m and v are decoded, update p, and are encoded again. A block in which a
    parameter ends is read and written whole: the buffers are padded. Bytes an element, 8 bits: 16 (10 read, 6 written)
    with fp32 weights and gradients, 10 with bf16 weights alone; 4 bits: two less; and 16 for each block.
    1. Kingma and Ba, 2015, algorithm 1. 2. Dettmers et al., 2022, section 2. 3. Li et al., 2023, section 4.
    """
    ROWS: tl.constexpr = _BLOCK // SIZE
    if tl.load(p_control + APPLIED_PLACE) > 0:
        i_k = tl.program_id(0).to(tl.int64)
        g, o_k, num = load_grad(p_table, i_k, GRAD, _BLOCK)
        # [ROWS]
        r = tl.arange(0, ROWS)
        m_r = r * SIZE < num
        i_r = o_k // SIZE + r
        # [ROWS * SIZE], all of a block or none of it
        whole = tl.multiple_of((num + SIZE - 1) // SIZE * SIZE, SIZE)
        i = tl.arange(0, _BLOCK)
        m_i = i < whole
        i = o_k + i
        code_1, code_2 = load_codes(p_code_1, o_k, whole, BITS, _BLOCK), load_codes(p_code_2, o_k, whole, BITS, _BLOCK)
        value_1 = tl.load(p_map_1 + code_1).to(tl.float32, bitcast=True)
        value_2 = tl.load(p_map_2 + code_2).to(tl.float32, bitcast=True)
        p = load_weight(p_param, p_low, i, m_i, FORM)
        # [ROWS, SIZE]
        g = tl.reshape(g, [ROWS, SIZE]) * tl.load(p_control + FACTOR_PLACE)
        absmax_1 = beta_1 * tl.load(p_absmax_1 + i_r, mask=m_r, other=0.0)
        absmax_2 = beta_2 * tl.load(p_absmax_2 + i_r, mask=m_r, other=0.0)
        m = tl.reshape(value_1, [ROWS, SIZE]) * absmax_1[:, None] + rest_1 * g
        v = tl.reshape(value_2, [ROWS, SIZE]) * absmax_2[:, None] + rest_2 * g * g
        rate = tl.load(p_rate) / tl.load(p_control + C1_PLACE)
        update = rate * m / (tl.sqrt(v) * (1 / tl.sqrt(tl.load(p_control + C2_PLACE))) + eps)
        p -= tl.reshape(update, [_BLOCK])
        store_weight(p_param, p_low, i, m_i, p, seed, tl.load(p_step), FORM)
        code, absmax_1 = encode_signed(m, BITS)
        store_codes(p_code_1, o_k, whole, tl.reshape(code, [_BLOCK]), BITS, _BLOCK)
        code, absmax_2 = _encode_unsigned(v, BITS)
        store_codes(p_code_2, o_k, whole, tl.reshape(code, [_BLOCK]), BITS, _BLOCK)
        tl.store(p_absmax_1 + i_r, absmax_1, mask=m_r)
        tl.store(p_absmax_2 + i_r, absmax_2, mask=m_r)


def adam_blockwise_update(
    weights: Weights,
    moments: Moments,
    table_K3: torch.Tensor,
    grad_dtype: torch.dtype,
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """`reference.adam_blockwise` in place; `table` holds the gradients' addresses; they share one dtype."""
    param, low, seed = weights
    maps = (values.view(torch.int32) for values in moments[4:])  # looked up as integers
    narrow = torch.float32 not in (param.dtype, grad_dtype)
    launch(
        adam_blockwise_kernel, (table_K3.shape[0],), param, param if low is None else low, *moments[:4], *maps,
        table_K3, control, rate, step, seed, hyper.beta_1, 1 - hyper.beta_1, hyper.beta_2, 1 - hyper.beta_2, hyper.eps,
        GRAD=GRAD_TYPES[grad_dtype], FORM=form_of(weights), BITS=moments.bits, SIZE=BLOCKS[moments.bits],
        num_warps=4 if narrow or moments.bits == 4 else 8,
    )  # fmt: skip
