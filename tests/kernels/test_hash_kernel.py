"""The hash inside Triton kernels against its torch form: the same 32-bit words."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sgg_kernels import reference
from sgg_kernels.hash_draw import hash_start, hash_word
from sgg_kernels.launch import launch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WORDS = [0, 1, 2, 12345, 2**31 - 1, -1, -(2**31), -987654321]


@triton.jit
def hash_kernel(p_words, p_out, seed, BLOCK: tl.constexpr):
    """out[i] = hash(seed, words[i], 3, i): a scalar, a loaded, a constant and a computed word."""
    i = tl.arange(0, BLOCK)
    h = hash_word(hash_start(seed), tl.load(p_words + i))
    tl.store(p_out + i, hash_word(hash_word(h, 3), i).to(tl.int32, bitcast=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 1, 16, 77, 2**31 - 1, -5])
def test_same_words_as_the_reference(device, seed):
    words = torch.tensor(WORDS, dtype=torch.int32, device=device)
    out = torch.full_like(words, -7)
    launch(hash_kernel, (1,), words, out, seed, BLOCK=len(WORDS))
    index = torch.arange(len(WORDS), device=device)
    expected = reference.hash_u32(seed, words, 3, index)
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)


def test_words_wider_than_32_bits_count_by_their_low_bits():
    words = torch.tensor(WORDS)
    assert torch.equal(reference.hash_u32(2**40 + 9, words), reference.hash_u32(9, words + 2**35))
