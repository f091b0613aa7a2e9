"""The hash of `sgg_kernels.reference.hash` in kernels: the same 32-bit words, in uint32 arithmetic.

Other kernels build their keys from `hash_start` and one `hash_word` a word. The launcher here draws a step's random
numbers, one launch a draw: the words of `reference.hash_u32`, uniform and normal numbers.
In aten a draw takes 20 to 60 launches over a few elements. Letters: B samples, K numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch
from .reference.hash import MAX_WORDS, NORMAL, UNIFORM, WORD

BLOCK = 256
_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def _mix(h):
    """MurmurHash3 fmix32 (Appleby, 2011); a uint32 product keeps its low bits, a uint32 shift is logical."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def hash_word(h, word):
    """The running hash `h` after one more word of the key (its low 32 bits)."""
    return _mix((h ^ tl.cast(word, tl.uint32)) + _GOLDEN)


@triton.jit
def hash_start(word):
    """The hash of a key of one word; `hash_word` adds the others in the reference's order."""
    return _mix(tl.cast(word, tl.uint32) + _GOLDEN)


@triton.jit
def _with_word(h, p_word, value, stride, i_b, m, FROM_MEMORY: tl.constexpr):
    """The hash after one word: an element of a tensor, or a number."""
    if FROM_MEMORY:
        return hash_word(h, tl.load(p_word + i_b * stride, mask=m, other=0))
    return hash_word(h, value)


@triton.jit
def _uniform(h):
    """fp32 in (0, 1) of a word: its upper 24 bits and a half."""
    u = (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    return tl.minimum(u, 0.999999940395355224609375)  # 1 - 2^-24: the half may round up to 1


@triton.jit
def _minus_log(u):
    """-log(u) of fp32 u in (0, 1), to a few ulp also near 1, where `lg2.approx` has no correct digit.

    u = m 2^e with m in [0.75, 1.5); log m = 2 artanh((m - 1) / (m + 1)) by its series.
    """
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F400000) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = 1.0 + z * (0.3333333333 + z * (0.2 + z * (0.1428571429 + z * (0.1111111111 + z * 0.0909090909))))
    return -(e.to(tl.float32) * 0.6931471805599453 + 2.0 * s * series)


@triton.jit
def _cos_of_turns(u):
    """cos(2 pi u) of u in [0, 1] = sin(2 pi z) with z = |u - 1/2| - 1/4, by the series of the sine up to t^13."""
    t = (tl.abs(u - 0.5) - 0.25) * 6.283185307179586
    q = t * t
    p = 2.7557319224e-6 + q * (-2.5052108385e-8 + q * 1.6059043837e-10)
    p = -1.6666666667e-1 + q * (8.3333333333e-3 + q * (-1.9841269841e-4 + q * p))
    return t + t * q * p


@triton.jit(do_not_specialize=["start", "value_1", "value_2", "value_3", "value_4", "num_rows"])
def hash_draw_kernel(
    p_out, p_1, p_2, p_3, p_4, start, value_1, value_2, value_3, value_4, stride_1, stride_2, stride_3, stride_4,
    num_rows, K,
    WORDS: tl.constexpr, FROM_MEMORY: tl.constexpr, AS_NORMAL: tl.constexpr, AS_UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, k] of the key (start, words of b, k): the key's word, or its uniform or normal number.

    FROM_MEMORY: bit i is set if word i is a tensor. A normal number takes the indices 2 k and 2 k + 1 [1]; the
    other kinds give one number a row (K = 1), and their key has no index. Bytes an element: 4 or 8 written.

    [1] Box & Muller, A note on the generation of random normal deviates (1958).
    """
    if AS_NORMAL:  # a program has one row: its words are scalars
        num_k = tl.cdiv(K, BLOCK)
        i_b = (tl.program_id(0) // num_k).to(tl.int64)
        o = tl.program_id(0) % num_k * BLOCK + tl.arange(0, BLOCK)
        m_word = i_b < num_rows
        m = o < K
        h = tl.cast(start, tl.uint32)
    else:
        i_b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        o = i_b
        m_word = i_b < num_rows
        m = m_word
        h = tl.zeros([BLOCK], tl.uint32) + tl.cast(start, tl.uint32)
    h = _with_word(h, p_1, value_1, stride_1, i_b, m_word, FROM_MEMORY & 1 > 0)
    if WORDS > 1:
        h = _with_word(h, p_2, value_2, stride_2, i_b, m_word, FROM_MEMORY & 2 > 0)
    if WORDS > 2:
        h = _with_word(h, p_3, value_3, stride_3, i_b, m_word, FROM_MEMORY & 4 > 0)
    if WORDS > 3:
        h = _with_word(h, p_4, value_4, stride_4, i_b, m_word, FROM_MEMORY & 8 > 0)
    if AS_NORMAL:
        radius = tl.sqrt(2.0 * _minus_log(_uniform(hash_word(h, 2 * o))))
        tl.store(p_out + i_b * K + o, radius * _cos_of_turns(_uniform(hash_word(h, 2 * o + 1))), mask=m)
    elif AS_UNIFORM:
        tl.store(p_out + o, _uniform(h), mask=m)
    else:
        tl.store(p_out + o, h.to(tl.int64), mask=m)


def hash_draw(words: Sequence[int | torch.Tensor], start: int, num: int, kind: int) -> torch.Tensor:
    """[B] words or uniform numbers, or [B, num] normal numbers.

    words: 1 to MAX_WORDS, at least one a tensor [B] or [1] of int32 or int64, the others 32-bit integers.
    start: the hash of the words before them, as a signed 32-bit integer.
    """
    tensors = [word for word in words if isinstance(word, torch.Tensor)]
    num_rows = max(len(word) for word in tensors)
    per_row = kind == NORMAL
    assert num < 2**30, "the indices of a row are 32-bit numbers"
    shape = (num_rows, num) if per_row else (num_rows,)
    out = torch.empty(shape, dtype=torch.int64 if kind == WORD else torch.float32, device=tensors[0].device)
    pointers, values, strides, from_memory = [], [], [], 0
    for i in range(MAX_WORDS):
        word = words[i] if i < len(words) else 0
        given = word if isinstance(word, torch.Tensor) else tensors[0]
        pointers.append(given)
        values.append(0 if given is word else word)
        strides.append(given.stride(0) if len(given) > 1 else 0)
        from_memory |= (given is word) << i
    grid = (num_rows * triton.cdiv(num, BLOCK) if per_row else triton.cdiv(num_rows, BLOCK),)
    launch(
        hash_draw_kernel, grid,
        out, *pointers, start, *values, *strides, num_rows, num if per_row else 1,
        WORDS=len(words), FROM_MEMORY=from_memory, AS_NORMAL=per_row, AS_UNIFORM=kind == UNIFORM, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out
