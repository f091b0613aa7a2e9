"""Access of the optimiser kernels to weights: `sgg_kernels.reference.weights` with the form as a constexpr.

These are device functions without a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .hash_draw import hash_start, hash_word
from .reference.weights import Weights

WHOLE, SPLIT, ROUNDED = range(3)
"""Forms: fp32; bf16 and the low halves of fp32; bf16 alone, rounded stochastically."""

_WHOLE, _SPLIT = tl.constexpr(WHOLE), tl.constexpr(SPLIT)


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
