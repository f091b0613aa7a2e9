"""Counter-based random numbers: a pure function of (seed, step, sample, stream, index).

Nothing carries generator state, so a resumed run, a captured step and any number of processes
draw the same numbers. The mixing function is MurmurHash3's 32-bit finaliser (Appleby, 2011), chained
over the words of the key. It is not a cryptographic hash.
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 fmix32 on int64 tensors that hold 32-bit words (a wrapped product keeps its low bits)."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def hash_u32(*words: int | torch.Tensor) -> torch.Tensor:
    """32-bit hash of a key of integer words, broadcast against each other. int64 result in [0, 2^32).

    At least one word must be a tensor; it decides the device.
    """
    device = next(w.device for w in words if isinstance(w, torch.Tensor))
    h = torch.zeros((), dtype=torch.int64, device=device)
    for word in words:
        w = word.to(torch.int64) if isinstance(word, torch.Tensor) else torch.full((), word & _MASK, device=device)
        h = _mix(((h ^ (w & _MASK)) + _GOLDEN) & _MASK)
    return h


def hash_uniform(*words: int | torch.Tensor) -> torch.Tensor:
    """fp32 uniform in (0, 1), 24 bits, never 0 or 1."""
    return ((hash_u32(*words) >> 8).to(torch.float64) * 2.0**-24 + 2.0**-25).to(torch.float32).clamp(max=1 - 2.0**-24)


def hash_normal(shape: tuple[int, ...], *words: int | torch.Tensor) -> torch.Tensor:
    """fp32 standard normal [B, *shape] by Box-Muller (1958); the tensor words of the key are [B]."""
    batch, num = next(w for w in words if isinstance(w, torch.Tensor)), math.prod(shape)
    index = torch.arange(num, device=batch.device)
    key = [w[:, None] if isinstance(w, torch.Tensor) else w for w in words]
    radius = torch.sqrt(-2 * torch.log(hash_uniform(*key, 2 * index)))
    angle = 2 * math.pi * hash_uniform(*key, 2 * index + 1)
    return (radius * torch.cos(angle)).reshape(batch.shape[0], *shape)
