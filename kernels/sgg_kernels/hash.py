"""The hash of `sgg_kernels.reference.hash` inside Triton kernels: the same 32-bit words, in uint32 arithmetic.

These are device functions without a launch: a kernel builds its key from `hash_start` and one `hash_word` a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
