"""PTX operations that NumPy lacks, on whole arrays; bit-exact unless a function states otherwise."""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}


def to_bf16(x):
    """fp32 -> bits of bf16 in a uint32, to nearest even; NaN is 0x7FFF."""
    bits = x.view(u4)
    rounded = (bits + (((bits >> u4(16)) & u4(1)) + u4(0x7FFF))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded)


def to_half(x):
    """fp32 -> bits of fp16 in a uint16, to nearest even; NaN is 0x7FFF."""
    return np.where(np.isnan(x), u2(0x7FFF), x.astype(f2).view(u2))


def from_bf16(bits):
    """Bits of bf16 in a uint16 -> fp32."""
    return (bits.astype(u4) << u4(16)).view(f4)


def _fused(a, b, c):
    """a b + c of fp32 numbers in float64, rounded to odd: rounded once more to a narrow type, it is correct."""
    product, c = a.astype(f8) * b.astype(f8), c.astype(f8)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    bits = total.view(i8)
    to_odd = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    if np.any(to_odd):
        bits = bits + np.where(to_odd, np.where((error > 0) == (total > 0), 1, -1), 0)
    return bits.view(f8)


def fma(a, b, c):
    """a b + c in fp32, rounded once: the product is exact in float64, the sum is rounded to odd there."""
    return _fused(a, b, c).astype(f4)


def narrow_fma(kind, a, b, c):
    """Bits of a b + c in fp16 or bf16 ("f16", "bf16"), rounded once, of bits in uint16."""
    if kind == "f16":
        exact = _fused(*(x.view(f2).astype(f4) for x in (a, b, c)))
        return np.where(np.isnan(exact), u2(0x7FFF), exact.astype(f2).view(u2))
    exact = _fused(*(from_bf16(x) for x in (a, b, c)))
    wide = exact.astype(f4)
    to_odd = (wide.astype(f8) != exact) & ((wide.view(i4) & 1) == 0) & np.isfinite(wide)
    bits = wide.view(i4) + np.where(to_odd, np.where(np.abs(wide.astype(f8)) < np.abs(exact), 1, -1), 0).astype(i4)
    return to_bf16(bits.astype(i4).view(f4)).astype(u2)


def narrow_fma_pairs(kind, *operands):
    """`narrow_fma` of both halves of 32-bit numbers."""
    low, high = (narrow_fma(kind, *((x >> u4(n)).astype(u2) for x in operands)) for n in (0, 16))
    return low.astype(u4) | (high.astype(u4) << u4(16))


def packed_halves(function, kind, *operands):
    """Apply a function to both 16-bit halves, integers of a type, of 32-bit numbers (from sm_90 on)."""
    low, high = (function(*((x >> u4(n)).astype(u2).view(kind) for x in operands)) for n in (0, 16))
    return low.view(u2).astype(u4) | (high.view(u2).astype(u4) << u4(16))


def packed(function, *operands):
    """Apply a function to both fp32 halves of 64-bit numbers (from sm_100 on)."""
    pairs = [np.ascontiguousarray(np.atleast_1d(x)).view(f4).reshape(-1, 2) for x in operands]
    made = np.ascontiguousarray(function(*np.broadcast_arrays(*pairs))).view(u8).ravel()
    return made if any(np.ndim(x) for x in operands) else made[0]


def divide(a, b):
    """Integer quotient towards zero. By zero, which PTX leaves undefined, all bits are set."""
    zero = b == 0
    b = np.where(zero, 1, b).astype(b.dtype)
    quotient = a // b
    if np.issubdtype(quotient.dtype, np.signedinteger):
        quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(quotient.dtype)
    return np.where(zero, ~a.dtype.type(0), quotient).astype(a.dtype)


def remainder(a, b):
    """Remainder of `divide`; its sign is a's."""
    return a - divide(a, b) * b


def high_product(a, b):
    """Upper half of the product of 64-bit numbers, both signed or both not."""
    ua, ub = a.view(u8), b.view(u8)
    low, half = u8(0xFFFFFFFF), u8(32)
    al, ah, bl, bh = ua & low, ua >> half, ub & low, ub >> half
    middle = (al * bl >> half) + (al * bh & low) + (ah * bl & low)
    high = ah * bh + (al * bh >> half) + (ah * bl >> half) + (middle >> half)
    if np.issubdtype(a.dtype, np.signedinteger):
        high = high - np.where(a < 0, ub, u8(0)) - np.where(b < 0, ua, u8(0))
    return high.view(a.dtype)


_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x, rounding, dtype):
    """fp32 -> 32-bit integer, clamped to its range; NaN is 0."""
    x, info = _ROUND[rounding](x.astype(f8)), np.iinfo(dtype)
    return np.where(np.isnan(x), 0, np.clip(x, info.min, info.max)).astype(i8).astype(dtype)


def ftz(x):
    """Subnormal fp32 to a zero of its sign."""
    bits = x.view(u4)
    return np.where((bits & u4(0x7F800000)) == 0, bits & u4(0x80000000), bits).view(f4)


def bit_field(x, position, length):
    """bfe.u32: `length` bits from `position`."""
    mask = np.where(length >= u4(32), u4(0xFFFFFFFF), (u4(1) << (length & u4(31))) - u4(1))
    return np.where(position >= u4(32), u4(0), (x >> (position & u4(31))) & mask)


def signed_bit_field(x, position, length):
    """bfe.s32: `length` bits from `position`, extended by the field's sign; bits above the word are its sign."""
    spare = i8(64) - np.clip(length.astype(i8), 1, 63)
    field = ((x.view(i4).astype(i8) >> np.minimum(position, u4(63)).astype(i8)) << spare) >> spare
    return np.where(length == 0, u4(0), field.astype(u4))


def insert_bits(x, into, position, length):
    """bfi.b32: the low `length` bits of x at `position` of the other number."""
    mask = np.where(length >= u4(32), u4(0xFFFFFFFF), (u4(1) << (length & u4(31))) - u4(1)) << position
    return ((x << position) & mask) | (into & ~mask)


def permute_bytes(a, b, selector):
    """prmt.b32: four of eight bytes, or their signs."""
    wide = a.astype(u8) | (b.astype(u8) << u8(32))
    out = u4(0)
    for i in range(4):
        chosen = (selector >> u4(4 * i)) & u4(15)
        byte = (wide >> ((chosen & u4(7)).astype(u8) * u8(8))).astype(u4) & u4(0xFF)
        sign = np.where((byte & u4(0x80)) != 0, u4(0xFF), u4(0))
        out = out | (np.where((chosen & u4(8)) != 0, sign, byte) << u4(8 * i))
    return out


def funnel_left(low, high, shift):
    """The upper word of high:low shifted left by 0 .. 32."""
    return (((low.astype(u8) | (high.astype(u8) << u8(32))) << shift.astype(u8)) >> u8(32)).astype(u4)


def funnel_right(low, high, shift):
    """The lower word of high:low shifted right by 0 .. 32."""
    return ((low.astype(u8) | (high.astype(u8) << u8(32))) >> shift.astype(u8)).astype(u4)
