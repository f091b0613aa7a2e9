"""`benchmarks.aot.ptx.arithmetic`: every function on whole arrays, against Python's integers and torch's rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.aot.programs import floats, integers, towards_zero, wrapped

from benchmarks.aot.ptx import arithmetic as pieces

WORD = 2**32 - 1


def bf16(*values: float) -> np.ndarray:
    """Bits."""
    return torch.tensor(values, dtype=torch.bfloat16).view(torch.int16).numpy().view("u2")


def test_narrow_floats_are_torchs():
    every = np.arange(2**16, dtype="u2")
    wide = torch.from_numpy(every.view("i2")).view(torch.bfloat16).float().numpy()
    assert np.array_equal(pieces.from_bf16(every).view("u4"), wide.view("u4"))
    beside = (wide.view("u4") + 1).view("f4")
    x = np.concatenate([floats(0), wide, beside])
    x = np.concatenate([x, ((np.arange(2**15, dtype="u4") << 16) + 0x8000).view("f4")])  # ties
    for function, dtype in ((pieces.to_bf16, torch.bfloat16), (pieces.to_half, torch.float16)):
        with np.errstate(all="ignore"):
            found = function(x).astype("u2").view("i2")
        assert np.isnan(x).any() and (found[np.isnan(x)] == 0x7FFF).all()
        want = torch.from_numpy(x).to(dtype).view(torch.int16).numpy()
        assert np.array_equal(found[~np.isnan(x)], want[~np.isnan(x)])


@pytest.mark.parametrize(("tiny", "want"), [(1e-12, 16785410), (-1e-12, 16785408), (0, 16785408)])
def test_a_fused_product_is_rounded_once(tiny, want):
    """4097 x 4097 lies between two fp32 numbers; float64 cannot hold the sum with so small a number."""
    a, c = np.full(3, 4097, "f4"), np.full(3, tiny, "f4")
    assert pieces.fma(a, a, c).tolist() == [want] * 3
    assert pieces.fma(-a, a, -c).tolist() == [-want] * 3


@pytest.mark.parametrize(
    ("tiny", "want"), [(0, [16640, 16640]), (2.0**-60, [16640, 16768]), (-(2.0**-60), [16512, 16640])]
)
def test_narrow_fused_products_are_rounded_once(tiny, want):
    """448 x 37 and 576 x 29 lie between two bf16 numbers, 24 x 683 between two fp16 numbers."""
    a, b, c = bf16(448, 576), bf16(37, 29), bf16(tiny, tiny)
    assert pieces.narrow_fma("bf16", a, b, c).tolist() == bf16(*want).tolist()
    pairs = pieces.narrow_fma_pairs("bf16", *(x.view("u4") for x in (a, b, c)))
    assert pairs.view("u2").tolist() == bf16(*want).tolist()
    small = np.sign(tiny) * 2.0**-24
    halves = (np.array([x], "f2").view("u2") for x in (24, 683, small))
    assert pieces.narrow_fma("f16", *halves).view("f2").tolist() == [16400 if tiny > 0 else 16384]


def test_halves_and_pairs_do_not_mix():
    low, high = np.array([3, 0xFFFF], "u4"), np.array([5, 7], "u4")
    assert pieces.packed_halves(np.maximum, np.int16, low, high).tolist() == [5, 7]
    assert pieces.packed_halves(np.maximum, np.uint16, low << np.uint32(16), high << np.uint32(16)).tolist() == [
        5 << 16, 0xFFFF0000,
    ]  # fmt: skip
    pair = np.array([1.5, -2.0], "f4").view("u8")
    several = np.array([10, 20, 30, 40], "f4").view("u8")
    assert pieces.packed(np.add, pair[0], several).view("f4").tolist() == [11.5, 18, 31.5, 38]
    alone = pieces.packed(np.multiply, pair[0], pair[0])
    assert np.ndim(alone) == 0 and np.array([alone]).view("f4").tolist() == [2.25, 4]


@pytest.mark.parametrize("t", ["s16", "s32", "s64", "u16", "u32", "u64"])
def test_quotients_and_products(t):
    a, b = integers(t, 30), integers(t, 31)
    b[b == (-1 if t[0] == "s" else 0)] = 5
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    none = wrapped([-1], a.dtype)[0]
    assert pieces.divide(a, b).tolist() == [towards_zero(x, y) if y else none for x, y in pairs]
    kept = b != 0
    rest = [x - towards_zero(x, y) * y for x, y in pairs if y]
    assert pieces.remainder(a[kept], b[kept]).tolist() == rest
    if t.endswith("64"):
        assert pieces.high_product(a, b).tolist() == [x * y >> 64 for x, y in pairs]


def test_floats_to_integers_and_to_zero():
    x = np.array([2.5, -2.5, 3e9, -3e9, np.nan, np.inf, -0.5], "f4")
    most, least = 2**31 - 1, -(2**31)
    assert pieces.to_integer(x, "rzi", np.int32).tolist() == [2, -2, most, least, 0, most, 0]
    assert pieces.to_integer(x, "rni", np.int32).tolist() == [2, -2, most, least, 0, most, 0]
    assert pieces.to_integer(x, "rmi", np.int32).tolist() == [2, -3, most, least, 0, most, -1]
    assert pieces.to_integer(x, "rpi", np.uint32).tolist() == [3, 0, 3_000_000_000, 0, 0, WORD, 0]
    small = np.array([1e-40, -1e-40, 1.1754944e-38, -3.0, 0.0, np.inf], "f4")
    flushed = np.array([0.0, -0.0, *small[2:]], "f4")
    assert np.array_equal(pieces.ftz(small).view("u4"), flushed.view("u4"))


def test_fields_of_bits():
    """Every length, from every position; a field that passes the word's end holds zeros or its sign there."""
    x, other = np.uint32(0x9ABCDEF1), np.uint32(0x12345678)
    position, length = (n.ravel().astype("u4") for n in np.meshgrid(np.arange(34), np.arange(34)))
    found = pieces.bit_field(np.full_like(position, x), position, length)
    signed = pieces.signed_bit_field(np.full_like(position, x), position, length)
    extended = int(x) - 2**32  # its own sign above bit 31
    for p, n, bits, with_sign in zip(position.tolist(), length.tolist(), found.tolist(), signed.tolist(), strict=True):
        assert bits == (int(x) >> p) & (2**n - 1)
        field = (extended >> p) & (2**n - 1)
        assert with_sign == (field - 2**n if n and field >> n - 1 else field) & WORD
    inside = position < 32
    position, length = position[inside], length[inside]
    made = pieces.insert_bits(np.full_like(position, x), np.full_like(position, other), position, length)
    for p, n, bits in zip(position.tolist(), length.tolist(), made.tolist(), strict=True):
        mask = ((2 ** min(n, 32) - 1) << p) & WORD
        assert bits == (int(other) & ~mask | (int(x) << p) & mask)


def test_bytes_and_funnels():
    low, high = np.array([0x83828180], "u4"), np.array([0x07060504], "u4")
    for selector, want in ((0x3210, 0x83828180), (0x7531, 0x07058381), (0x8C3B, 0xFF0083FF)):
        assert pieces.permute_bytes(low, high, np.array([selector], "u4")).tolist() == [want], hex(selector)
    shift = np.arange(33, dtype="u4")
    both = 0x07060504_83828180
    assert pieces.funnel_left(low, high, shift).tolist() == [both << n >> 32 & WORD for n in range(33)]
    assert pieces.funnel_right(low, high, shift).tolist() == [both >> n & WORD for n in range(33)]
