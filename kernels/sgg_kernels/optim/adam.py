"""`adam`: one Adam step over flat buffers, gradients read where backward left them. Definition: `reference.adam`.

Weights are read and written in one of three forms (`reference.weights`).
A step takes three launches for any number of parameters: the sums of squares of the gradients by chunk, one program
that makes the decision, and the update. `adam_blockwise.py` has the update for moments in 8 and 4 bits, `adafactor.py`
the one for factored second moments. Nothing is read back. All values that vary from step to step lie in device tensors,
so the launches can be captured.
Letters: P elements of the flat buffers, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..hash_draw import hash_start, hash_word
from ..launch import launch
from ..reference.adam import (
    APPLIED,
    BLOCK,
    CORRECTION_1,
    CORRECTION_2,
    FACTOR,
    INVERSE_SCALE,
    NORM,
    Hyper,
)
from ..reference.weights import Weights

NUM_WARPS = 4
DECIDE_BLOCK, DECIDE_WARPS = 16384, 32

WHOLE, SPLIT, ROUNDED = range(3)
"""Forms: fp32; bf16 and the low halves of fp32; bf16 alone, rounded stochastically."""

_WHOLE, _SPLIT = tl.constexpr(WHOLE), tl.constexpr(SPLIT)

GRAD_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

INVERSE_SCALE_PLACE, FACTOR_PLACE = tl.constexpr(INVERSE_SCALE), tl.constexpr(FACTOR)
APPLIED_PLACE, NORM_PLACE = tl.constexpr(APPLIED), tl.constexpr(NORM)
C1_PLACE, C2_PLACE = tl.constexpr(CORRECTION_1), tl.constexpr(CORRECTION_2)


def form_of(weights: Weights) -> int:
    """The form of a buffer, for the kernel's constexpr FORM."""
    if weights.param.dtype == torch.float32:
        return WHOLE
    return ROUNDED if weights.low is None else SPLIT


@triton.jit
def _bf16_of(high):
    """The bf16 number whose bits are the low 16 of an int32."""
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_weight(p_param, p_low, i, m_i, FORM: tl.constexpr):
    """The weights at indices i in fp32. Bytes an element: 4, or 2 with bf16 alone."""
    param = tl.load(p_param + i, mask=m_i, other=0.0)
    if FORM == _SPLIT:
        low = tl.load(p_low + i, mask=m_i, other=0).to(tl.int32)
        bits = (param.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low
        return bits.to(tl.float32, bitcast=True)
    return param.to(tl.float32)


@triton.jit
def store_weight(p_param, p_low, i, m_i, wide, seed, step, FORM: tl.constexpr):
    """Write fp32 numbers; seed and step are the key of stochastic rounding. Bytes an element: as `load_weight`."""
    if FORM == _WHOLE:
        tl.store(p_param + i, wide, mask=m_i)
    else:
        bits = wide.to(tl.int32, bitcast=True)
        if FORM == _SPLIT:
            # A NaN stays NaN: a GPU's NaN is 0x7FFFFFFF, which would carry into the sign and become -0.
            high = (bits + tl.where(wide == wide, 0x8000, 0)) >> 16
            tl.store(p_low + i, (bits - (high << 16)).to(tl.int16), mask=m_i)
        else:
            drawn = hash_word(hash_word(hash_start(seed), step), i) & 0xFFFF
            high = (bits + tl.where(tl.abs(wide) < float("inf"), drawn, 0).to(tl.int32)) >> 16
        tl.store(p_param + i, _bf16_of(high), mask=m_i)


@triton.jit
def load_grad(p_table, i_k, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """(gradients of chunk i_k in fp32, 0 beyond its end; offset of its first element in the buffers; their number).

    Loads are 16 bytes wide: the last one may read past the gradient's end, within its allocation.
    """
    LANE: tl.constexpr = 128 // GRAD.primitive_bitwidth
    address = tl.load(p_table + 3 * i_k)
    o_k = tl.multiple_of(tl.load(p_table + 3 * i_k + 1), 16)
    num = tl.load(p_table + 3 * i_k + 2).to(tl.int32)  # the upper half is the matrix's number
    p_grad = tl.multiple_of(address.to(tl.pointer_type(GRAD)), 16)
    i = tl.arange(0, BLOCK)
    # [BLOCK]
    g = tl.load(p_grad + i, mask=i < tl.multiple_of((num + LANE - 1) // LANE * LANE, LANE), other=0.0).to(tl.float32)
    return tl.where(i < num, g, 0.0), o_k, num


@triton.jit
def adam_squares_kernel(p_table, p_squares, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of each chunk's gradients. Bytes: 4 an element, 2 in bf16."""
    i_k = tl.program_id(0).to(tl.int64)
    g, _, _ = load_grad(p_table, i_k, GRAD, BLOCK)
    tl.store(p_squares + i_k, tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def adam_decide_kernel(
    p_squares, p_control, p_step, num_chunks, beta_1, rest_1, beta_2, rest_2, max_norm,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: norm, clipping, decision to apply the step, and the corrections `c = beta c + (1 - beta)`.

    rest: 1 - beta from the host, because fp32 arithmetic gives it to six digits only.
    """
    # [BLOCK]
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for o in range(0, num_chunks, BLOCK):
        k = o + tl.arange(0, BLOCK)
        m_k = k < tl.multiple_of((num_chunks + 3) // 4 * 4, 4)
        total += tl.where(k < num_chunks, tl.load(p_squares + k, mask=m_k, other=0.0), 0.0)
    inverse_scale = tl.load(p_control + INVERSE_SCALE_PLACE)
    norm = tl.sqrt(tl.sum(total, 0)) * inverse_scale
    applied = norm < float("inf")  # false for NaN as well
    factor = inverse_scale
    if CLIP:
        factor = inverse_scale * tl.minimum(max_norm / (norm + 1e-6), 1.0)
    c_1, c_2 = tl.load(p_control + C1_PLACE), tl.load(p_control + C2_PLACE)
    tl.store(p_control + C1_PLACE, tl.where(applied, c_1 * beta_1 + rest_1, c_1))
    tl.store(p_control + C2_PLACE, tl.where(applied, c_2 * beta_2 + rest_2, c_2))
    tl.store(p_control + APPLIED_PLACE, applied.to(tl.float32))
    tl.store(p_control + FACTOR_PLACE, factor)
    tl.store(p_control + NORM_PLACE, norm)
    tl.store(p_step, tl.load(p_step) + applied.to(tl.int32))


@triton.jit(do_not_specialize=["seed"])
def adam_kernel(
    p_param, p_low, p_m, p_v, p_table, p_control, p_rate, p_step, seed, rest_1, beta_2, rest_2, eps,
    GRAD: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m += (1 - beta_1)(g - m); v += (1 - beta_2)(g^2 - v); p -= lr / c_1 m / (sqrt(v / c_2) + eps), g scaled first.

    Bytes: 28 an element (16 read, 12 written) in fp32. 1. Kingma and Ba, 2015, algorithm 1.
    """
    if tl.load(p_control + APPLIED_PLACE) > 0:
        g, o_k, num = load_grad(p_table, tl.program_id(0).to(tl.int64), GRAD, BLOCK)
        g = g * tl.load(p_control + FACTOR_PLACE)
        i = tl.arange(0, BLOCK)
        m_i = i < tl.multiple_of((num + 15) // 16 * 16, 16)
        i = o_k + i
        # [BLOCK]
        m = tl.load(p_m + i, mask=m_i, other=0.0)
        v = tl.load(p_v + i, mask=m_i, other=0.0)
        p = load_weight(p_param, p_low, i, m_i, FORM)
        m += rest_1 * (g - m)
        v = beta_2 * v + rest_2 * g * g
        rate = tl.load(p_rate) / tl.load(p_control + C1_PLACE)
        spread = tl.sqrt(v) / tl.sqrt(tl.load(p_control + C2_PLACE)) + eps
        tl.store(p_m + i, m, mask=m_i)
        tl.store(p_v + i, v, mask=m_i)
        store_weight(p_param, p_low, i, m_i, p - rate * m / spread, seed, tl.load(p_step), FORM)


def adam_table(addresses: Sequence[int], offsets: Sequence[int], numels: Sequence[int], itemsize: int) -> torch.Tensor:
    """[K, 3] int64 on the host: address of each chunk's gradients, offset in the flat buffers, number of elements.

    Addresses must be multiples of 16 bytes, offsets of 16 elements. itemsize: bytes of an element.
    """
    assert all(address % 16 == 0 for address in addresses), "a gradient does not start on 16 bytes"
    assert all(offset % 16 == 0 for offset in offsets)
    address, offset, num = (torch.tensor(x, dtype=torch.int64) for x in (addresses, offsets, numels))
    chunks = (num + BLOCK - 1) // BLOCK
    address, offset, num, before = (
        x.repeat_interleave(chunks) for x in (address, offset, num, chunks.cumsum(0) - chunks)
    )
    first = BLOCK * (torch.arange(len(num)) - before)
    return torch.stack([address + itemsize * first, offset + first, (num - first).clamp(max=BLOCK)], dim=1)


def adam_decide(
    tables: Sequence[torch.Tensor],
    grad_dtypes: Sequence[torch.dtype],
    control: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """`reference.adam.adam_decide` from the squares of all gradients; the gradients of one table share a dtype."""
    ends = [0]
    for table_K3 in tables:
        ends.append(ends[-1] + table_K3.shape[0])
    squares_K = torch.empty(ends[-1] + 3, dtype=torch.float32, device=control.device)
    for table_K3, dtype, first in zip(tables, grad_dtypes, ends, strict=False):
        launch(
            adam_squares_kernel, (table_K3.shape[0],), table_K3, squares_K[first:],
            GRAD=GRAD_TYPES[dtype], BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    launch(
        adam_decide_kernel, (1,), squares_K, control, step, ends[-1],
        hyper.beta_1, 1 - hyper.beta_1, hyper.beta_2, 1 - hyper.beta_2, hyper.max_norm,
        CLIP=hyper.max_norm > 0, BLOCK=DECIDE_BLOCK, num_warps=DECIDE_WARPS,
    )  # fmt: skip


def adam_update(
    weights: Weights,
    moments: Sequence[torch.Tensor],
    table_K3: torch.Tensor,
    grad_dtype: torch.dtype,
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """`reference.adam.adam_update`; `table` holds the addresses of the gradients when the launch runs."""
    param, low, seed = weights
    launch(
        adam_kernel, (table_K3.shape[0],), param, param if low is None else low, *moments, table_K3,
        control, rate, step, seed, 1 - hyper.beta_1, hyper.beta_2, 1 - hyper.beta_2, hyper.eps,
        GRAD=GRAD_TYPES[grad_dtype], FORM=form_of(weights), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
