"""The hash in kernels against its torch form: the same words and uniform numbers, normal numbers to a few ulp."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from sgg_kernels import reference
from sgg_kernels.hash_draw import _cos_of_turns, _minus_log, hash_start, hash_word
from sgg_kernels.launch import launch

from sgg_fast import ops

WORDS = [0, 1, 2, 12345, 2**31 - 1, -1, -(2**31), -987654321]


@triton.jit
def parts_kernel(p_u, p_log, p_cos, BLOCK: tl.constexpr):
    """-log(u) and cos(2 pi u)."""
    u = tl.load(p_u + tl.arange(0, BLOCK))
    tl.store(p_log + tl.arange(0, BLOCK), _minus_log(u))
    tl.store(p_cos + tl.arange(0, BLOCK), _cos_of_turns(u))


@triton.jit
def hash_kernel(p_words, p_out, seed, BLOCK: tl.constexpr):
    """out[i] = hash(seed, words[i], 3, i): a scalar, a loaded, a constant and a computed word."""
    i = tl.arange(0, BLOCK)
    h = hash_word(hash_start(seed), tl.load(p_words + i))
    tl.store(p_out + i, hash_word(hash_word(h, 3), i).to(tl.int32, bitcast=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("seed", [0, 1, 16, 77, 2**31 - 1, -5])
def test_same_words_as_the_reference(device, seed):
    words = torch.tensor(WORDS, dtype=torch.int32, device=device)
    out = torch.full_like(words, -7)
    launch(hash_kernel, (1,), words, out, seed, BLOCK=len(WORDS))
    index = torch.arange(len(WORDS), device=device)
    expected = reference.hash_u32(seed, words, 3, index)
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)


SAMPLES = torch.tensor([5, 0, 62_561, 2**31 + 3, -7])


@pytest.fixture(autouse=True)
def kernels():
    ops.use_kernels("triton")


def keys(device: str) -> dict[str, tuple[int | torch.Tensor, ...]]:
    """Every pattern of words that the losses use, and the longest one."""
    sample, step = SAMPLES.to(device), torch.tensor([123], dtype=torch.int32, device=device)
    place = torch.arange(5, device=device, dtype=torch.int32)
    return {
        "captured": (77, step, sample, 12),
        "integers first": (2**40 - 1, -3, sample, 13),
        "a tensor first": (sample, 14, place),
        "two tensors": (1, step, sample, 18, place),
        "a wide number": (0, sample, 2**32 - 5, 2**31),
        "every second row": (9, torch.arange(10, device=device)[::2], step),
        "one row": (step,),
    }


@pytest.mark.parametrize("name", keys("cpu"))
def test_words_and_uniform_numbers_have_the_same_bits(name, device, poisoned):
    key = keys(device)[name]
    assert torch.equal(ops.hash_u32(*key), reference.hash_u32(*key))
    assert torch.equal(ops.hash_uniform(*key), reference.hash_uniform(*key))


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 31)])
@pytest.mark.parametrize("name", ["captured", "two tensors", "one row"])
def test_normal_numbers(name, shape, device, poisoned):
    """Against Box-Muller of the same uniform numbers in float64."""
    key, num = keys(device)[name], math.prod(shape)
    columns = [word[:, None] if isinstance(word, torch.Tensor) else word for word in key]
    u = reference.hash_uniform(*columns, torch.arange(2 * num, device=device)).double()
    exact = (torch.sqrt(-2 * torch.log(u[:, ::2])) * torch.cos(2 * math.pi * u[:, 1::2])).reshape(len(u), *shape)
    found = ops.hash_normal(shape, *key)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert (found - exact).abs().max() <= 2e-6
    assert (reference.hash_normal(shape, *key) - exact).abs().max() <= 2e-6


def test_the_ends_of_the_uniform_numbers(device):
    """The logarithm near 1 and at the smallest number, the cosine at quarter turns: no NaN, no lost digit."""
    u = torch.tensor([2.0**-25, 3 * 2.0**-25, 1e-3, 0.25, 0.375, 0.5, 0.7499999, 0.75, 0.7500001, 0.999, 1 - 2.0**-23,
                      1 - 2.0**-24, 0.1, 0.9, 1 / 3, 2 / 3], device=device)  # fmt: skip
    log, cos = torch.empty_like(u), torch.empty_like(u)
    launch(parts_kernel, (1,), u, log, cos, BLOCK=16)
    assert torch.allclose(log.double(), -u.double().log(), rtol=4e-7, atol=0)
    assert torch.allclose(cos.double(), (2 * math.pi * u.double()).cos(), rtol=0, atol=3e-7)
