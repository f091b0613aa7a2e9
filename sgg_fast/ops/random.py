"""Random numbers as a hash of a key: `sgg_kernels.reference.hash`, or one launch a draw on the kernels' backend.

The words of a key are integers and integer tensors. Words and uniform numbers have the same bits on every backend;
normal numbers agree to a few ulp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sgg_kernels import reference
from sgg_kernels.reference.hash import MAX_WORDS, NORMAL, UNIFORM, WORD
from torch import Tensor

from .dispatch import backend_for
from .operator import operator

Word = int | Tensor


@operator("hash_draw", torch.Tag.nondeterministic_seeded)  # fake tensors must not run it on constants of one element
def _draw(tensors: Sequence[Tensor], values: Sequence[int], places: int, start: int, num: int, kind: int) -> Tensor:
    """`sgg_kernels.hash_draw`; bit i of `places` is set where word i is the next of `tensors`."""
    from sgg_kernels.hash_draw import hash_draw

    left = iter(tensors)
    words = [next(left) if places >> i & 1 else value for i, value in enumerate(values)]
    return hash_draw(words, start, num, kind)


@_draw.register_fake
def _(tensors, values, places, start, num, kind):
    rows = max(word.shape[0] for word in tensors)
    shape = (rows, num) if kind == NORMAL else (rows,)
    return tensors[0].new_empty(shape, dtype=torch.int64 if kind == WORD else torch.float32)


def _signed(word: int) -> int:
    """The low 32 bits as a signed integer."""
    return (word + 2**31) % 2**32 - 2**31


def _by_kernel(words: tuple[Word, ...], num: int, kind: int) -> Tensor | None:
    """The draw in one launch; None on the reference's backend, and for keys that the kernel does not take."""
    tensors = [word for word in words if isinstance(word, Tensor)]
    first = next(i for i, word in enumerate(words) if isinstance(word, Tensor))
    rest = words[first:]
    sizes = {len(word) for word in tensors if word.ndim == 1} - {1}
    fits = len(rest) <= MAX_WORDS and len(sizes) <= 1 and all(word.ndim == 1 and len(word) for word in tensors)
    if not fits or backend_for(tensors[0].device) == "reference":
        return None
    start = reference.hash_words([word for word in words[:first] if isinstance(word, int)])
    values = [0 if isinstance(word, Tensor) else _signed(word) for word in rest]
    places = sum(isinstance(word, Tensor) << i for i, word in enumerate(rest))
    return _draw(tensors, values, places, _signed(start), num, kind)


def hash_u32(*words: Word) -> Tensor:
    """32-bit hash of a key of integer words, broadcast against each other: int64 in [0, 2^32).

    At least one word must be a tensor, of int32 or int64.
    """
    drawn = _by_kernel(words, 1, WORD)
    return reference.hash_u32(*words) if drawn is None else drawn


def hash_uniform(*words: Word) -> Tensor:
    """fp32 uniform in (0, 1), 24 bits, never 0 or 1; one number a key, as `hash_u32`."""
    drawn = _by_kernel(words, 1, UNIFORM)
    return reference.hash_uniform(*words) if drawn is None else drawn


def hash_normal(shape: tuple[int, ...], *words: Word) -> Tensor:
    """fp32 standard normal [B, *shape] by Box-Muller (1958); the tensor words of the key are [B], or [1] for all."""
    drawn = _by_kernel(words, math.prod(shape), NORMAL)
    return reference.hash_normal(shape, *words) if drawn is None else drawn.reshape(-1, *shape)
