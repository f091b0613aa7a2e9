"""Counter-based random numbers: a pure function of (seed, step, sample, stream, index).

There is no generator state, so a resumed run, a captured step and any number of processes draw the same numbers. The
mixing function is MurmurHash3's 32-bit finaliser (Appleby, 2011), chained over the words of the key. It is not a
cryptographic hash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

WORD, UNIFORM, NORMAL = 0, 1, 2
"""Kinds of numbers of `sgg_kernels.hash_draw`: int64 words below 2^32, fp32 uniform in (0, 1), fp32 standard normal."""
MAX_WORDS = 4
"""Words that its kernel hashes, after those that the host does."""

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9

_Word = int | torch.Tensor


def _mix(h: _Word) -> _Word:
    """MurmurHash3 fmix32 of 32-bit words, as integers or int64 tensors (a wrapped product keeps its low bits)."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def hash_words(words: Sequence[int]) -> int:
    """Hash of a key of integers, below 2^32; 0 for an empty key. The start of a longer key's hash."""
    h: Any = 0
    for word in words:
        h = _mix(((h ^ (word & _MASK)) + _GOLDEN) & _MASK)
    return h


def hash_u32(*words: _Word) -> torch.Tensor:
    """32-bit hash of a key of integer words, broadcast against each other. int64 result in [0, 2^32).

    At least one word must be a tensor; the host hashes the words before it.
    """
    h: _Word = 0
    for word in words:
        w = word.to(torch.int64) if isinstance(word, torch.Tensor) else word
        h = _mix(((h ^ (w & _MASK)) + _GOLDEN) & _MASK)
    assert isinstance(h, torch.Tensor)
    return h


def hash_uniform(*words: int | torch.Tensor) -> torch.Tensor:
    """fp32 uniform in (0, 1), 24 bits, never 0 or 1."""
    return ((hash_u32(*words) >> 8).to(torch.float64) * 2.0**-24 + 2.0**-25).to(torch.float32).clamp(max=1 - 2.0**-24)


def hash_normal(shape: tuple[int, ...], *words: int | torch.Tensor) -> torch.Tensor:
    """fp32 standard normal [B, *shape] by Box-Muller (1958); the tensor words of the key are [B], or [1] for all."""
    device, num = next(w.device for w in words if isinstance(w, torch.Tensor)), math.prod(shape)
    key = [w[:, None] if isinstance(w, torch.Tensor) else w for w in words]
    uniform = hash_uniform(*key, torch.arange(2 * num, device=device))
    radius, angle = torch.sqrt(-2 * torch.log(uniform[:, ::2])), 2 * math.pi * uniform[:, 1::2]
    return (radius * torch.cos(angle)).reshape(len(uniform), *shape)
