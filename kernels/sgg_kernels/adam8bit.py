"""`adam8bit`: one Adam step of flat weights whose moments are 8-bit codes. Definition: `reference.adam8bit`.

A group of parameters takes one launch, after the two launches of `adam.py` that decide on the step. Dettmers' kernels
find a code by bisection, with some 11 loads a moment; these kernels compute it.
Letters: P elements of the flat buffers, R blocks of 256 elements with one scale each, K chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
from .launch import launch
from .reference.adam import Hyper
from .reference.adam8bit import BLOCK_8BIT, DECADES, LEAST_SCALE, ZERO_1, Moments
from .reference.weights import Weights

_BLOCK, _ROWS = tl.constexpr(BLOCK_8BIT), tl.constexpr(BLOCK // BLOCK_8BIT)
_ZERO_1, _LEAST_SCALE, _DECADES = tl.constexpr(ZERO_1), tl.constexpr(LEAST_SCALE), tl.constexpr(DECADES)


def _lines(first: int) -> tuple[tuple[float, float], ...]:
    """(slope, intercept) of the map x -> level for each decade d, which has `first 2^d` parts.

    Parts are numbered across decades: decade d holds the levels from first 2^d to first 2^(d + 1). Within a decade the
    level is linear in x. The slopes fall from decade to decade, so the level is the least of all lines.
    """
    made = []
    for decade in range(DECADES):
        parts, unit = first * 2**decade, 10.0 ** (decade + 1 - DECADES)
        made.append((parts / (0.9 * unit), parts * 0.8 / 0.9))
    # The lowest part ends half way to 0; `_code` needs a fifth of a part there.
    unit, centre, end = 10.0 ** (1 - DECADES), 0.1 + 0.45 / first, 0.1 + 0.9 / first
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


@triton.jit(do_not_specialize=["seed"])
def adam8bit_kernel(
    p_param, p_low, p_code_1, p_code_2, p_absmax_1, p_absmax_2, p_map_1, p_map_2, p_table, p_control, p_rate, p_step,
    seed, beta_1, rest_1, beta_2, rest_2, eps, GRAD: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """m = beta_1 m + (1 - beta_1) g; v = beta_2 v + (1 - beta_2) g^2; p -= lr / c_1 m / (sqrt(v / c_2) + eps).

    g is scaled first; rest = 1 - beta. m and v are decoded, update p, and are encoded again. A block in which a
    parameter ends is read and written whole: the buffers are padded. Bytes an element: 16 (10 read, 6 written) with
    fp32 weights and gradients, 10 with bf16 weights alone; and 16 for each block of 256.
    1. Kingma and Ba, 2015, algorithm 1. 2. Dettmers et al., 2022, section 2.
    """
    if tl.load(p_control + APPLIED_PLACE) > 0:
        i_k = tl.program_id(0).to(tl.int64)
        g, o_k, num = load_grad(p_table, i_k, GRAD, _ROWS * _BLOCK)
        # [ROWS]
        r = tl.arange(0, _ROWS)
        m_r = r * _BLOCK < num
        i_r = o_k // _BLOCK + r
        # [ROWS * 256], all of a block or none of it
        i = tl.arange(0, _ROWS * _BLOCK)
        m_i = i < tl.multiple_of((num + _BLOCK - 1) // _BLOCK * _BLOCK, _BLOCK)
        i = o_k + i
        value_1 = tl.load(p_map_1 + tl.load(p_code_1 + i, mask=m_i, other=0)).to(tl.float32, bitcast=True)
        value_2 = tl.load(p_map_2 + tl.load(p_code_2 + i, mask=m_i, other=0)).to(tl.float32, bitcast=True)
        p = load_weight(p_param, p_low, i, m_i, FORM)
        # [ROWS, 256]
        g = tl.reshape(g, [_ROWS, _BLOCK]) * tl.load(p_control + FACTOR_PLACE)
        absmax_1 = beta_1 * tl.load(p_absmax_1 + i_r, mask=m_r, other=0.0)
        absmax_2 = beta_2 * tl.load(p_absmax_2 + i_r, mask=m_r, other=0.0)
        m = tl.reshape(value_1, [_ROWS, _BLOCK]) * absmax_1[:, None] + rest_1 * g
        v = tl.reshape(value_2, [_ROWS, _BLOCK]) * absmax_2[:, None] + rest_2 * g * g
        rate = tl.load(p_rate) / tl.load(p_control + C1_PLACE)
        update = rate * m / (tl.sqrt(v) * (1 / tl.sqrt(tl.load(p_control + C2_PLACE))) + eps)
        p -= tl.reshape(update, [_ROWS * _BLOCK])
        store_weight(p_param, p_low, i, m_i, p, seed, tl.load(p_step), FORM)
        absmax_1, absmax_2 = tl.max(tl.abs(m), 1), tl.max(v, 1)
        inverse_1 = tl.where(absmax_1 < _LEAST_SCALE, 0.0, 1 / tl.maximum(absmax_1, _LEAST_SCALE))
        inverse_2 = tl.where(absmax_2 < _LEAST_SCALE, 0.0, 1 / tl.maximum(absmax_2, _LEAST_SCALE))
        size = _code(tl.abs(m) * inverse_1[:, None], _LINES_1, 128)
        code_1 = _ZERO_1 + tl.where(m < 0, -tl.minimum(size, 127), size)
        code_2 = tl.maximum(_code(v * inverse_2[:, None], _LINES_2, 256) - 1, (v > 0).to(tl.int32))
        tl.store(p_code_1 + i, tl.reshape(code_1, [_ROWS * _BLOCK]).to(tl.uint8), mask=m_i)
        tl.store(p_code_2 + i, tl.reshape(code_2, [_ROWS * _BLOCK]).to(tl.uint8), mask=m_i)
        tl.store(p_absmax_1 + i_r, absmax_1, mask=m_r)
        tl.store(p_absmax_2 + i_r, absmax_2, mask=m_r)


def adam8bit_update(
    weights: Weights,
    moments: Moments,
    table_K3: torch.Tensor,
    grad_dtype: torch.dtype,
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """`reference.adam8bit` in place; `table` holds the addresses of the gradients, which share one dtype."""
    param, low, seed = weights
    maps = (values.view(torch.int32) for values in moments[4:])  # looked up as integers
    narrow = torch.float32 not in (param.dtype, grad_dtype)
    launch(
        adam8bit_kernel, (table_K3.shape[0],), param, param if low is None else low, *moments[:4], *maps, table_K3,
        control, rate, step, seed, hyper.beta_1, 1 - hyper.beta_1, hyper.beta_2, 1 - hyper.beta_2, hyper.eps,
        GRAD=GRAD_TYPES[grad_dtype], FORM=form_of(weights), num_warps=4 if narrow else 8,
    )  # fmt: skip
