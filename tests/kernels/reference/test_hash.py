"""The counter-based random numbers: the definition in Python integers, uniformity, independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from sgg_kernels.reference import hash_normal, hash_u32, hash_uniform, hash_words
from support import loops

GOLDEN = 0x9E3779B9


def scalar(word: int) -> torch.Tensor:
    return torch.tensor([word])


def unmix(h: int) -> int:
    """Inverse of MurmurHash3's finaliser, which is a bijection."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
    h ^= h >> 13 ^ h >> 26
    h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return h ^ h >> 16


def test_mixer_is_murmurs_finaliser():
    """fmix32(1) = 0x514E28B7 is the published value; the word before the added constant is 1 - GOLDEN."""
    assert hash_u32(scalar((1 - GOLDEN) % 2**32)).item() == 0x514E28B7
    assert hash_u32(scalar((0 - GOLDEN) % 2**32)).item() == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [((0,), 2462723854), ((1,), 2527132011), ((0, 0), 3553795876), ((1, 2, 3, 4), 1346338562)],
)
def test_golden_values_never_change(key, value):
    """A change would silently alter every mask, timestep and noise of a resumed run."""
    assert hash_u32(scalar(key[0]), *key[1:]).item() == value == loops.hash_u32(*key)
    assert hash_words(key) == value


def test_definition_in_python_integers():
    index = torch.arange(7)
    for key in [(0, 0, 0), (1, 700_000, 62_564), (2**31, 2**32 - 1, 5), (-1, 3, 2**40 + 7)]:
        found = hash_u32(key[0], key[1], torch.tensor([[key[2]], [9]]), index)
        expected = [[loops.hash_u32(key[0], key[1], sample, i) for i in range(7)] for sample in (key[2], 9)]
        assert found.tolist() == expected
        assert found.dtype == torch.int64 and found.min() >= 0 and found.max() < 2**32


def test_words_do_not_commute_or_cancel():
    keys = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (0, 0, 3), (3, 0, 0), (0, 1, 2, 0), (0, 1)]
    assert len({hash_u32(scalar(key[0]), *key[1:]).item() for key in keys}) == len(keys)


@pytest.mark.parametrize("word", range(5))
def test_uniform_over_each_word_of_the_key(word):
    """Chi-square over 64 cells of 2^14 draws; 63 degrees of freedom, mean 63, standard deviation 11."""
    key: list[int | torch.Tensor] = [3, 14, 159, 26, 5]
    key[word] = torch.arange(2**14)
    u = hash_uniform(*key)
    counts = torch.bincount((u * 64).long(), minlength=64).double()
    assert ((counts - 256) ** 2 / 256).sum() < 63 + 6 * 11
    lagged = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(lagged) < 5 / 2**7


@pytest.mark.parametrize("word", range(3))
def test_one_flipped_bit_flips_half_the_result(word):
    key = [5, 6, 7]
    flips = []
    for bit in range(32):
        other = key.copy()
        other[word] ^= 1 << bit
        index = torch.arange(64)
        difference = hash_u32(*key, index) ^ hash_u32(*other, index)
        flips += [value.bit_count() for value in difference.tolist()]
    assert abs(sum(flips) / len(flips) - 16) < 0.5


def test_uniform_is_the_middle_of_its_cell_and_never_reaches_the_ends():
    words = [(unmix(h) - GOLDEN) % 2**32 for h in (0, 255, 2**32 - 1, 2**31)]
    u = hash_uniform(torch.tensor(words))
    assert u.dtype == torch.float32
    assert u[0] == u[1] == 2.0**-25
    assert u[2] == 1 - 2.0**-24
    assert u[3] == 0.5  # (2^23 + 1/2) / 2^24, rounded to fp32
    key = torch.arange(50)
    expected = torch.tensor([loops.uniform(8, i) for i in range(50)], dtype=torch.float64)
    torch.testing.assert_close(hash_uniform(8, key).double(), expected, rtol=0, atol=2.0**-25)


def test_normal_is_box_muller_of_the_key():
    found = hash_normal((2, 3), 4, 5, torch.tensor([6, 60]), 7)
    assert found.shape == (2, 2, 3) and found.dtype == torch.float32
    for row, sample in zip(found, (6, 60), strict=True):
        torch.testing.assert_close(row.flatten(), loops.normals(6, 4, 5, sample, 7), rtol=1e-5, atol=1e-5)


def test_normal_has_normal_moments_and_tails():
    z = hash_normal((2**16,), 0, 1, torch.tensor([2]), 3).flatten().double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((z.abs() > 3).double().mean() - 0.0027) < 5 * math.sqrt(0.0027 / n)


def test_a_samples_numbers_do_not_depend_on_the_batch():
    batch = torch.tensor([9, 4, 11, 4])
    together = hash_normal((3, 2), 1, 2, batch, 3)
    for row, sample in zip(together, batch, strict=True):
        assert torch.equal(row, hash_normal((3, 2), 1, 2, sample[None], 3)[0])
    assert torch.equal(together[1], together[3])
    assert not torch.equal(together[0], together[1])


def test_seed_step_and_stream_each_change_the_draw():
    sample = torch.tensor([3])
    draws = [
        hash_normal((4,), *key) for key in [(0, 0, sample, 1), (1, 0, sample, 1), (0, 1, sample, 1), (0, 0, sample, 2)]
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not torch.equal(a, b)


def test_words_wider_than_32_bits_count_by_their_low_bits():
    words = torch.tensor([0, 1, 2, 12345, 2**31 - 1, -1, -(2**31), -987654321])
    assert torch.equal(hash_u32(2**40 + 9, words), hash_u32(9, words + 2**35))
