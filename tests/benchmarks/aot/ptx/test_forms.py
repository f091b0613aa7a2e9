"""Every arithmetic form of the PTX machine, from PTX by hand, against Python's exact integers and NumPy's floats."""

from __future__ import annotations

import pathlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.aot.programs import INTS, aligned, at_lane, evaluate, floats, integers, run, towards_zero, wrapped

from benchmarks.aot.ptx.forms import FORMS

TYPED = ("s16", "s32", "s64", "u16", "u32", "u64")


TWO = {"add": lambda a, b, w: a + b, "sub": lambda a, b, w: a - b, "mul.lo": lambda a, b, w: a * b,
       "mul.hi": lambda a, b, w: a * b >> w, "min": lambda a, b, w: min(a, b), "max": lambda a, b, w: max(a, b),
       "and": lambda a, b, w: a & b, "or": lambda a, b, w: a | b, "xor": lambda a, b, w: a ^ b}  # fmt: skip


@pytest.mark.parametrize("t", TYPED)
@pytest.mark.parametrize("op", TWO)
def test_integers(op, t):
    form = f"{op}.{'b' + t[1:] if op in ('and', 'or', 'xor') else t}"
    a, b = integers(t, 0), integers(t, 1)
    want = [TWO[op](int(x), int(y), 8 * a.itemsize) for x, y in zip(a, b, strict=True)]
    assert np.array_equal(evaluate(form, [a, b], a.dtype), wrapped(want, a.dtype))


@pytest.mark.parametrize("t", TYPED)
def test_division_goes_towards_zero(t):
    a, b = integers(t, 2), integers(t, 3)
    b[(b == 0) | (b == -1 if t[0] == "s" else False)] = 3
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert evaluate(f"div.{t}", [a, b], a.dtype).tolist() == [towards_zero(*p) for p in pairs]
    assert evaluate(f"rem.{t}", [a, b], a.dtype).tolist() == [x - towards_zero(x, y) * y for x, y in pairs]


@pytest.mark.parametrize("t", ["s16", "s32", "u16", "u32"])
def test_wide_products(t):
    a, b = integers(t, 4), integers(t, 5)
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    c = integers(f"{t[0]}{16 * a.itemsize}", 6)
    product = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert evaluate(f"mul.wide.{t}", [a, b], wide).tolist() == product
    total = wrapped([p + int(z) for p, z in zip(product, c, strict=True)], wide)
    assert np.array_equal(evaluate(f"mad.wide.{t}", [a, b, c], wide), total)
    low = [p + int(z) for p, z in zip(product, a, strict=True)]
    assert np.array_equal(evaluate(f"mad.lo.{t}", [a, b, a], a.dtype), wrapped(low, a.dtype))


@pytest.mark.parametrize("t", ["s16", "s32", "s64"])
def test_signs(t):
    a = integers(t, 7)
    assert np.array_equal(evaluate(f"neg.{t}", [a], a.dtype), wrapped([-int(x) for x in a], a.dtype))
    assert np.array_equal(evaluate(f"abs.{t}", [a], a.dtype), wrapped([abs(int(x)) for x in a], a.dtype))


@pytest.mark.parametrize("t", ["s16", "s32", "s64", "b16", "b32", "b64"])
def test_shifts_by_more_than_the_width(t):
    a, by = integers(t, 8), integers("u32", 9)
    by[:20] %= 70
    wide = 8 * a.itemsize
    right = [int(x) >> min(int(n), wide) for x, n in zip(a, by, strict=True)]
    assert np.array_equal(evaluate(f"shr.{t}", [a, by], a.dtype), wrapped(right, a.dtype))
    left = [int(x) << int(n) if n < wide else 0 for x, n in zip(a, by, strict=True)]
    assert np.array_equal(evaluate(f"shl.b{wide}", [a, by], a.dtype), wrapped(left, a.dtype))
    assert np.array_equal(evaluate(f"not.b{wide}", [a], a.dtype), ~a)


def test_predicates():
    a, b = integers("u32", 10) % 2 == 0, integers("u32", 11) % 3 == 0
    for op, want in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        assert np.array_equal(evaluate(f"{op}.pred", [a, b], bool), want)
    assert np.array_equal(evaluate("not.pred", [a], bool), ~a)
    x, y = integers("b64", 12), integers("b64", 13)
    assert np.array_equal(evaluate("selp.b64", [x, y, a], np.uint64), np.where(a, x, y))
    assert np.array_equal(evaluate("selp.f32", [floats(0).view("u4"), floats(1).view("u4"), a], np.uint32),
                          np.where(a, floats(0), floats(1)).view("u4"))  # fmt: skip


def test_bits():
    a, b, c = (integers("u32", k) for k in (14, 15, 16))
    position, length = b % 32, c % 33
    field = [(int(x) >> int(p)) & (2 ** int(n) - 1) for x, p, n in zip(a, position, length, strict=True)]
    assert evaluate("bfe.u32", [a, position, length], np.uint32).tolist() == field
    signed = [
        (((int(x) >> int(p)) & (2 ** int(n) - 1)) ^ 1 << int(n) - 1) - (1 << int(n) - 1) if n else 0
        for x, p, n in zip(a.view("i4"), position, length, strict=True)
    ]
    assert evaluate("bfe.s32", [a.view("i4"), position, length], np.int32).tolist() == signed
    into = [
        (int(y) & ~((2 ** int(n) - 1) << int(p)) | (int(x) & (2 ** int(n) - 1)) << int(p)) & 0xFFFFFFFF
        for x, y, p, n in zip(a, b, position, length, strict=True)
    ]
    assert evaluate("bfi.b32", [a, b, position, length], np.uint32).tolist() == into
    for table in (0x80, 0x96, 0xE8, 0x1B, 0, 255):
        want = [sum((table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32))
                for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]  # fmt: skip
        assert evaluate("lop3.b32", [a, b, c], np.uint32, tail=hex(table)).tolist() == want
    for mode, limit in (("wrap", lambda n: n % 32), ("clamp", lambda n: min(n, 32))):
        wide = [(int(h) << 32 | int(x), limit(int(n))) for x, h, n in zip(a, b, length + c % 9, strict=True)]
        inputs = [a, b, length + c % 9]
        assert evaluate(f"shf.r.{mode}.b32", inputs, np.uint32).tolist() == [w >> n & 0xFFFFFFFF for w, n in wide]
        assert evaluate(f"shf.l.{mode}.b32", inputs, np.uint32).tolist() == [
            (w << n) >> 32 & 0xFFFFFFFF for w, n in wide
        ]


def test_prmt_picks_bytes_and_their_signs():
    a, b = integers("u32", 17), integers("u32", 18)
    for selector in (0x3210, 0x7654, 0x5410, 0x7632, 0x8C1F):
        want = []
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            eight = (x | y << 32).to_bytes(8, "little")
            picked = [eight[selector >> 4 * i & 7] for i in range(4)]
            out = [(255 if v & 128 else 0) if selector >> 4 * i & 8 else v for i, v in enumerate(picked)]
            want.append(int.from_bytes(bytes(out), "little"))
        assert evaluate("prmt.b32", [a, b], np.uint32, tail=hex(selector)).tolist() == want


ORDERED = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
           "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}  # fmt: skip


@pytest.mark.parametrize("how", ORDERED)
@pytest.mark.parametrize("t", TYPED)
def test_comparisons_of_integers(how, t):
    a, b = integers(t, 19), integers(t, 20)
    b[::3] = a[::3]
    assert np.array_equal(evaluate(f"setp.{how}.{t}", [a, b], bool), ORDERED[how](a, b))


@pytest.mark.parametrize("how", [*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
@pytest.mark.parametrize("t", ["f32", "f16", "bf16"])
def test_comparisons_of_floats_and_nan(how, t):
    """Ordered ones, `ne` included, are false where either is NaN, the others true."""
    a, b = floats(2), floats(3)
    b[::3] = a[::3]
    if t != "f32":
        a, b = (np.clip(x, -6e4, 6e4).astype(np.float16) for x in (a, b))
    none = np.isnan(a) | np.isnan(b)
    want = {"num": ~none, "nan": none}.get(how)
    if want is None:
        want = ORDERED[how[:2]](a, b) & ~none | (none if how.endswith("u") else False)
    bits = [x.view(f"u{x.itemsize}") for x in (a, b)]
    if t == "bf16":
        bits = [(x.astype(np.float32).view("u4") >> 16).astype("u2") for x in (a, b)]
        a, b = ((x.astype("u4") << 16).view("f4") for x in bits)
        if how not in ("num", "nan"):
            want = ORDERED[how[:2]](a, b) & ~none | (none if how.endswith("u") else False)
    assert np.array_equal(evaluate(f"setp.{how}.{t}", bits, bool), want)


@pytest.mark.parametrize("form", ["add.f32", "add.rn.f32", "sub.f32", "mul.f32", "mul.rn.f32"])
def test_sums_and_products_of_floats(form):
    a, b = floats(4), floats(5)
    with np.errstate(all="ignore"):
        want = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[form[:3]](a, b)
    np.testing.assert_array_equal(evaluate(form, [a, b], np.float32), want)


def test_extremes_of_floats():
    """Of a number and NaN the number, unless .NaN asks otherwise."""
    a, b = floats(6), floats(7)
    np.testing.assert_array_equal(evaluate("max.f32", [a, b], np.float32), np.fmax(a, b))
    np.testing.assert_array_equal(evaluate("min.f32", [a, b], np.float32), np.fmin(a, b))
    np.testing.assert_array_equal(evaluate("max.NaN.f32", [a, b], np.float32), np.maximum(a, b))
    c = floats(14)
    np.testing.assert_array_equal(evaluate("max.f32", [a, b, c], np.float32), np.fmax(np.fmax(a, b), c))
    np.testing.assert_array_equal(evaluate("neg.f32", [a], np.float32), -a)
    np.testing.assert_array_equal(evaluate("abs.f32", [a], np.float32), np.abs(a))
    flushed = np.where(np.abs(a) < 1.2e-38, 0, np.abs(a))
    np.testing.assert_array_equal(evaluate("abs.ftz.f32", [a], np.float32), flushed)


def test_extremes_of_integers_that_stop_at_zero():
    """sm_90 has them."""
    a, b = integers("s32", 22), integers("s32", 23)
    assert np.array_equal(evaluate("min.relu.s32", [a, b], np.int32), np.maximum(np.minimum(a, b), 0))
    assert np.array_equal(evaluate("max.relu.s32", [a, b], np.int32), np.maximum(np.maximum(a, b), 0))


@pytest.mark.parametrize("word", ["min", "max"])
@pytest.mark.parametrize("sign", ["s", "u"])
def test_extremes_of_both_halves(word, sign):
    """sm_90 has them. Each half is a number of its own, with its own sign."""
    a, b = (integers("u32", seed) for seed in (25, 26))
    halves = [x.view(f"{'i' if sign == 's' else 'u'}2") for x in (a, b)]
    expected = {"min": np.minimum, "max": np.maximum}[word](*halves).view(np.uint32)
    assert np.array_equal(evaluate(f"{word}.{sign}16x2", [a, b], np.uint32), expected)


def test_bits_that_are_set():
    x = integers("u32", 24)
    assert evaluate("popc.b32", [x], np.uint32).tolist() == [int(n).bit_count() for n in x.view("u4")]


def test_two_floats_in_one_register():
    """sm_120 has them."""
    a, b, c = (np.random.default_rng(k).standard_normal(64).astype("f4") for k in range(3))
    wide = [x.view("u8") for x in (a, b, c)]
    for form, want in {"add.f32x2": a + b, "sub.rn.f32x2": a - b, "mul.f32x2": a * b}.items():
        assert np.array_equal(evaluate(form, wide[:2], np.uint64).view("f4"), want)
    exact = (a.astype("f8") * b + c).astype("f4")
    np.testing.assert_allclose(evaluate("fma.rn.f32x2", wide, np.uint64).view("f4"), exact, rtol=2e-7)


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_sums_of_16_bits_and_fp32(t):
    """sm_120 has them: the first operand is widened, which is exact; the sum is rounded once."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[t]
    a, b = torch.from_numpy(floats(8)).to(dtype), floats(9)
    bits, wide = a.view(torch.int16).numpy().view(np.uint16), a.float().numpy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate(f"add.rn.f32.{t}", [bits, b], np.float32), wide + b)
        np.testing.assert_array_equal(evaluate(f"sub.rn.f32.{t}", [bits, b], np.float32), wide - b)


@pytest.mark.parametrize("form", ["add", "sub.rn", "mul", "fma.rn"])
@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_arithmetic_of_16_bits_rounds_once(t, form):
    """The nearest 16-bit number to the exact result, in one register and in both halves of a pair."""
    dtype, rng = {"bf16": torch.bfloat16, "f16": torch.float16}[t], np.random.default_rng(3)
    a, b, c = (torch.from_numpy(rng.standard_normal(64) * 2.0 ** rng.integers(-6, 6, 64)).to(dtype) for _ in range(3))
    c[:20], b[20:30] = -(a * b)[:20], a[20:30]
    given = [a, b, c][: 3 if form == "fma.rn" else 2]
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in given]
    pairs = evaluate(f"{form}.{t}x2", [x.view(np.uint32) for x in bits], np.uint32)
    found = np.concatenate([evaluate(f"{form}.{t}", [x[k : k + 32] for x in bits], np.uint16) for k in (0, 32)])
    assert np.array_equal(pairs.view(np.uint16), found)
    exact = {"add": lambda x, y: x + y, "sub.rn": lambda x, y: x - y, "mul": lambda x, y: x * y,
             "fma.rn": lambda x, y, z: x * y + z}[form]  # fmt: skip
    result = torch.from_numpy(found.view(np.int16)).view(dtype)
    for k, r in enumerate(result):
        want = exact(*(Fraction(x[k].item()) for x in given))
        half = max(abs(Fraction(r.item())) * Fraction(torch.finfo(dtype).eps) / 2, Fraction(2) ** -25)
        assert abs(Fraction(r.item()) - want) <= half, (k, r, want)
    specials = [np.resize(np.array(x, np.uint16), 32) for x in ([0x8000, 0x7FFF], [0x8000, 0x0000])]
    if form != "fma.rn":
        first = {"add": 0x8000, "sub.rn": 0x0000, "mul": 0x0000}[form]
        assert evaluate(f"{form}.{t}", specials, np.uint16)[:2].tolist() == [first, 0x7FFF]


def test_fma_rounds_once():
    """The nearest fp32 number to the exact sum; a product rounded first would often be another."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(32).astype(np.float32) for _ in range(3))
    c[:16] = -(a * b)[:16]
    found, apart = evaluate("fma.rn.f32", [a, b, c], np.float32), 0
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = [np.nextafter(r, np.float32(s) * np.float32(np.inf)) for s in (-1, 1)]
        assert all(abs(Fraction(float(r)) - exact) <= abs(Fraction(float(n)) - exact) for n in near)
        apart += np.float32(x) * np.float32(y) + np.float32(z) != r
    assert apart > 10
    tiny = np.full(32, 1e-40, np.float32)
    assert not evaluate("fma.rn.ftz.f32", [tiny, np.ones_like(tiny), tiny], np.float32).any()


@pytest.mark.parametrize(
    ("form", "exact"),
    [("sqrt.approx.ftz.f32", np.sqrt), ("sqrt.rn.f32", np.sqrt), ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
     ("rcp.approx.ftz.f32", lambda x: 1 / x), ("rcp.rn.f32", lambda x: 1 / x), ("ex2.approx.ftz.f32", np.exp2),
     ("lg2.approx.f32", np.log2)],
)  # fmt: skip
def test_functions(form, exact):
    """Within two units of the last place, which is what `approx` allows; the machine rounds correctly."""
    x = np.abs(floats(8))
    x[(x < 1e-37) | (x > 1e37)] = 0.75  # whose reciprocals are subnormal
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(
            evaluate(form, [x], np.float32), exact(x.astype(np.float64)).astype(np.float32), rtol=3e-7
        )


def test_division_of_floats():
    a, b = floats(9), floats(10)
    with np.errstate(all="ignore"):
        want = (a.astype(np.float64) / b).astype(np.float32)
    for form in ("div.full.f32", "div.rn.f32", "div.approx.f32"):
        np.testing.assert_allclose(evaluate(form, [a, b], np.float32), want, rtol=3e-7)


def test_to_bf16_and_fp16_to_nearest_even():
    a, b = floats(11), floats(12)
    for form, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        one, other = (torch.from_numpy(x).to(dtype) for x in (a, b))
        found = torch.from_numpy(evaluate(f"cvt.rn.{form}.f32", [a], np.uint16).view(np.int16)).view(dtype)
        torch.testing.assert_close(found, one, rtol=0, atol=0, equal_nan=True)
        pair = evaluate(f"cvt.rn.{form}x2.f32", [a, b], np.uint32)  # the first operand is the upper half
        upper, lower = (torch.from_numpy((pair >> s).astype(np.uint16).view(np.int16)).view(dtype) for s in (16, 0))
        torch.testing.assert_close(upper, one, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(lower, other, rtol=0, atol=0, equal_nan=True)
        bits = one.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(evaluate(f"cvt.f32.{form}", [bits], np.float32), one.float().numpy())


@pytest.mark.parametrize(
    ("rounding", "function"), [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_to_integers_stay_in_range(rounding, function):
    x = floats(13)
    for t, (low, high) in {"s32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1)}.items():
        want = [0 if np.isnan(v) else int(np.clip(function(np.float64(v)), low, high)) for v in x]
        assert evaluate(f"cvt.{rounding}.{t}.f32", [x], INTS[t]).tolist() == want


@pytest.mark.parametrize("to", ["s16", "s32", "s64", "u16", "u32", "u64"])
@pytest.mark.parametrize("source", ["s8", "u8", "s16", "s32", "s64", "u16", "u32", "u64"])
def test_between_integers(source, to):
    a = integers(source, 21)
    if to != source:
        want = wrapped([int(x) for x in a], INTS[to])
        assert np.array_equal(evaluate(f"cvt.{to}.{source}", [a], INTS[to]), want)
    if source not in ("s8", "u8"):
        np.testing.assert_array_equal(evaluate(f"cvt.rn.f32.{source}", [a], np.float32), a.astype(np.float32))


def test_packed_comparison_of_halves():
    """Of both halves, or of one."""
    a, b = (np.array([1.0, 2.0] * 32, "f2") for _ in range(2))
    b[::2] = 0.5
    out = aligned(np.zeros(32, "u4"))
    for kind in ("f16x2", "bf16x2"):
        one, other = a, b
        if kind == "bf16x2":
            one, other = ((x.astype("f4").view("u4") >> 16).astype("u2") for x in (a, b))
        body = (
            "".join(at_lane(4, f"%rd{i}", f"%rd{9 + i}") for i in (1, 2, 3))
            + f"""
	ld.global.b32 %r10, [%rd10];
	ld.global.b32 %r11, [%rd11];
	setp.le.{kind} %p1|%p2, %r10, %r11;
	selp.b32 %r12, 1, 0, %p1;
	selp.b32 %r13, 2, 0, %p2;
	or.b32 %r12, %r12, %r13;
	st.global.b32 [%rd12], %r12;"""
        )
        run(body, aligned(one.view("u4")), aligned(other.view("u4")), out)
        assert (out == 2).all()


def test_every_opcode_of_the_list_has_a_test():
    text = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    assert not [stem for stem in FORMS if not any(f"{stem}{end}" in text for end in ".;") and f'"{stem}"' not in text]
