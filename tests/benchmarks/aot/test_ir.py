"""`benchmarks.aot.ir`: addresses of TTGIR by hand, their width, and what the lanes of a warp touch at once."""

from __future__ import annotations

import itertools

import pytest
from support.aot.modules import LOOP, ROW, module
from support.aot.programs import towards_zero

from benchmarks.aot import ir
from benchmarks.aot.ir import INDIRECT, MAX_INDEX, STRIDED, Access, Kernel, Value
from benchmarks.aot.mlir import LaneLayout

ARGUMENTS = [("x_ptr", None), ("out_ptr", None), ("stride", 512), ("num", 10_000_000)]


def problems(text: str, *grid: int) -> list[str]:
    return [problem for access in Kernel(text, ARGUMENTS, grid or (1,)).accesses for problem in access.problems()]


def test_a_row_is_read_and_written_in_order():
    """Up to the last program whose row begins within 32 bits."""
    load, store = Kernel(ROW, ARGUMENTS, (2**22,)).accesses
    assert (load.kind, load.argument, store.kind, store.argument) == ("load", "x_ptr", "store", "out_ptr")
    assert load.steps == store.steps == (1,) and load.shape == (512,) and not load.is_integer
    assert (load.item_bytes, load.lane_bytes, load.layout) == (4, 16, LaneLayout((4,), (32,), (0,)))
    assert problems(ROW, 2**22) == []
    assert problems(ROW, 2**22 + 1) == [
        f"{access}: 32-bit offset muli in 32 bits, up to 2,147,483,648"
        for access in ("load of x_ptr", "store of out_ptr")
    ]
    assert problems(ROW.replace("%firsts, %o", "%o, %o"), 1) == [
        f"{access}: adjacent lanes are 2 elements apart" for access in ("load of x_ptr", "store of out_ptr")
    ]


def test_a_pointer_may_advance_and_an_offset_may_not():
    assert problems(LOOP) == []
    offset = LOOP.replace("%p_x = %p) -> (tensor<512xf32, #blocked>, tensor<512x!tt.ptr<f32>, #blocked>)",
                          "%at = %c0) -> (tensor<512xf32, #blocked>, i32)")  # fmt: skip
    offset = offset.replace("%value = tt.load %p_x", """%first = tt.addptr %x_ptr, %at : !tt.ptr<f32>, i32
      %firsts = tt.splat %first : !tt.ptr<f32> -> tensor<512x!tt.ptr<f32>, #blocked>
      %p_x = tt.addptr %firsts, %o : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>
      %value = tt.load %p_x""")  # fmt: skip
    offset = offset.replace("tt.addptr %p_x, %step : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>",
                            "arith.addi %at, %stride : i32")  # fmt: skip
    offset = offset.replace("scf.yield %more, %next : tensor<512xf32, #blocked>, tensor<512x!tt.ptr<f32>, #blocked>",
                            "scf.yield %more, %next : tensor<512xf32, #blocked>, i32")  # fmt: skip
    (problem,) = problems(offset)
    assert problem.startswith("load of x_ptr: 32-bit offset addi in 32 bits")


def gathered(wide: bool) -> str:
    """Rows by their loaded numbers, as offsets of 64 bits or of 32."""
    of_rows, of_row = "#ttg.slice<{dim = 1, parent = #tile}>", "#ttg.slice<{dim = 0, parent = #tile}>"
    bits = 64 if wide else 32
    text = module(f"""
    %m = tt.make_range {{end = 16 : i32, start = 0 : i32}} : tensor<16xi32, {of_rows}>
    %is = tt.splat %index_ptr : !tt.ptr<i32> -> tensor<16x!tt.ptr<i32>, {of_rows}>
    %ip = tt.addptr %is, %m : tensor<16x!tt.ptr<i32>, {of_rows}>, tensor<16xi32, {of_rows}>
    %i32s = tt.load %ip : tensor<16x!tt.ptr<i32>, {of_rows}>
    %i64s = arith.extsi %i32s : tensor<16xi32, {of_rows}> to tensor<16xi64, {of_rows}>
    %rows = tt.expand_dims %i{bits}s {{axis = 1 : i32}} : tensor<16xi{bits}, {of_rows}> -> tensor<16x1xi{bits}, #tile>
    %c = arith.constant dense<512> : tensor<16x1xi{bits}, #tile>
    %firsts = arith.muli %rows, %c : tensor<16x1xi{bits}, #tile>
    %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<16x1x!tt.ptr<f32>, #tile>
    %p1 = tt.addptr %x, %firsts : tensor<16x1x!tt.ptr<f32>, #tile>, tensor<16x1xi{bits}, #tile>
    %p = tt.broadcast %p1 : tensor<16x1x!tt.ptr<f32>, #tile> -> tensor<16x128x!tt.ptr<f32>, #tile>
    %d = tt.make_range {{end = 128 : i32, start = 0 : i32}} : tensor<128xi32, {of_row}>
    %d1 = tt.expand_dims %d {{axis = 0 : i32}} : tensor<128xi32, {of_row}> -> tensor<1x128xi32, #tile>
    %o = tt.broadcast %d1 : tensor<1x128xi32, #tile> -> tensor<16x128xi32, #tile>
    %q = tt.addptr %p, %o : tensor<16x128x!tt.ptr<f32>, #tile>, tensor<16x128xi32, #tile>
    %value = tt.load %q : tensor<16x128x!tt.ptr<f32>, #tile>""")
    return text.replace("%out_ptr: !tt.ptr<f32>", "%index_ptr: !tt.ptr<i32>")


def test_rows_by_loaded_numbers():
    """A loaded number is below MAX_INDEX. Along a row the lanes are adjacent, from row to row anywhere."""
    look_up, load = Kernel(gathered(True), ARGUMENTS, (1,)).accesses
    assert look_up.is_integer and look_up.steps == (1,) and load.steps == (INDIRECT, 1) and load.wrapped is None
    *_, load = Kernel(gathered(False), ARGUMENTS, (1,)).accesses
    assert load.wrapped == f"muli in 32 bits, up to {512 * (MAX_INDEX - 1):,}"


SCALARS = {
    "programs": "%o = arith.muli %i, %n : i32",
    "narrowed": """
    %w = arith.extsi %i : i32 to i64
    %v = arith.muli %w, %w : i64
    %o = arith.trunci %v : i64 to i32""",
    "chosen": """
    %s = arith.muli %i, %n : i32
    %c = arith.cmpi slt, %i, %n : i32
    %o = arith.select %c, %i, %s : i32""",
    "one of two": """
    %c = arith.cmpi slt, %i, %n : i32
    %o = scf.if %c -> (i32) {
      scf.yield %i : i32
    } else {
      %s = arith.muli %i, %n : i32
      scf.yield %s : i32
    }""",
    "shifted": "%k = arith.constant 16 : i32\n%o = arith.shli %i, %k : i32",
}


@pytest.mark.parametrize("name", SCALARS)
def test_numbers_that_leave_32_bits_on_their_way_to_an_address(name):
    """40 000 programs squared fit; 50 000 do not. A shift by 16 bits holds 32 768."""
    text = module(f"""
    %i = tt.get_program_id x : i32
    %n = tt.get_num_programs x : i32
    %one = arith.constant 1.0 : f32
    {SCALARS[name]}
    %p = tt.addptr %out_ptr, %o : !tt.ptr<f32>, i32
    tt.store %p, %one : !tt.ptr<f32>""")
    assert problems(text, 32_768 if name == "shifted" else 40_000) == []
    (problem,) = problems(text, 50_000)
    arithmetic = {"narrowed": "trunci", "shifted": "shli"}.get(name, "muli")
    assert problem.startswith(f"store of out_ptr: 32-bit offset {arithmetic} in 32 bits")


def test_an_operation_that_cannot_be_followed_is_an_error():
    text = module("""
    %c0 = arith.constant 0 : i32
    %r = scf.while (%i = %c0) : (i32) -> i32 {
      %c = arith.cmpi slt, %i, %num : i32
      scf.condition(%c) %i : i32
    } do {
    ^bb0(%i: i32):
      %n = arith.addi %i, %stride : i32
      scf.yield %n : i32
    }""")
    with pytest.raises(ValueError, match=r"^scf.while: an operation that this check cannot follow$"):
        Kernel(text, ARGUMENTS, (1,))


VECTOR = LaneLayout((4,), (32,), (0,))
TILE = LaneLayout((1, 1), (8, 4), (1, 0))


@pytest.mark.parametrize(
    ("shape", "layout", "steps", "change", "problem"),
    [
        ((512,), VECTOR, (1,), {}, ""),
        ((512,), VECTOR, (0,), {}, ""),
        ((512,), VECTOR, (STRIDED,), {}, "adjacent lanes are strided elements apart"),
        ((512,), VECTOR, (INDIRECT,), {}, "adjacent lanes are indirect elements apart"),
        ((512,), VECTOR, (INDIRECT,), {"is_integer": True}, ""),
        ((512,), VECTOR, (INDIRECT,), {"is_integer": True, "kind": "store"}, "adjacent lanes are indirect"),
        ((512,), None, (1,), {}, "a layout that this check cannot read"),
        ((), None, (), {}, ""),
        ((16, 64), TILE, (STRIDED, 1), {}, "a warp touches runs of 8 bytes"),
        ((16, 64), TILE, (STRIDED, 1), {"item_bytes": 8}, ""),
        ((16, 4), TILE, (STRIDED, 1), {}, ""),
        ((16, 1), TILE, (1, STRIDED), {}, ""),
    ],
)
def test_what_a_warp_touches(shape, layout, steps, change, problem):
    """Look-ups of integers are exempt. Short runs are a fault but where they are the tile's whole row."""
    given = {"kind": "load", "argument": "x", "is_integer": False, "item_bytes": 2, "wrapped": None} | change
    access = Access(shape=shape, layout=layout, steps=steps, **given)
    found = access.problems()
    assert bool(found) == bool(problem) and all(problem in line for line in found)
    width = 1 if layout is None else min(layout.per_thread[layout.order[0]], shape[layout.order[0]])
    assert access.lane_bytes == width * access.item_bytes


EXACT = {
    "addi": int.__add__,
    "subi": int.__sub__,
    "muli": int.__mul__,
    "divsi": towards_zero,
    "floordivsi": int.__floordiv__,
    "ceildivsi": lambda a, b: -(-a // b),
    "remsi": lambda a, b: a - b * towards_zero(a, b),
    "minsi": min,
    "maxsi": max,
    "andi": int.__and__,
    "shli": int.__lshift__,
    "shrsi": int.__rshift__,
}


@pytest.mark.parametrize("name", EXACT)
def test_an_interval_holds_every_result(name):
    """Of every pair of numbers of some intervals; those of sums, products and extremes are the smallest."""
    spans = [(-7, -2), (-5, 6), (0, 3), (2, 9), (4, 4)]
    for (a, b), (c, d) in itertools.product(spans, spans):
        needs_positive = name.startswith(("div", "floor", "ceil", "rem")) and c <= 0
        if needs_positive or (name.startswith("sh") and c != d) or (name == "andi" and min(a, c) < 0):
            assert ir._interval(name, Value(a, b), Value(c, d)) is None
            continue
        low, high = ir._interval(name, Value(a, b), Value(c, d))
        results = [EXACT[name](x, y) for x in range(a, b + 1) for y in range(c, d + 1)]
        assert low <= min(results) and max(results) <= high, (name, a, b, c, d)
        if name in ("addi", "subi", "muli", "minsi", "maxsi", "shli", "shrsi", "divsi"):
            assert (low, high) == (min(results), max(results))
    assert ir._interval("xori", Value(0, 1), Value(0, 1)) is None
    assert ir._div(-7, 2) == -3 and ir._div(7, -2) == -3 and ir._div(7, 2) == 3


def test_steps_of_sums_and_products():
    """A number times a step is known if it is one number; what no line describes is strided, or indirect."""
    four, several = Value(4, 4), Value(2, 9)
    assert ir._add_steps(1, 3) == 4 and ir._add_steps(1, STRIDED) == STRIDED
    assert ir._add_steps(STRIDED, INDIRECT) == INDIRECT
    assert ir._mul_step(3, 0, several, four) == 12 and ir._mul_step(0, 3, four, several) == 12
    assert ir._mul_step(3, 0, four, several) == STRIDED and ir._mul_step(0, 0, several, several) == 0
    assert ir._mul_step(1, 1, four, four) == STRIDED and ir._mul_step(INDIRECT, 0, four, four) == INDIRECT
    assert ir._any_step(0, 0) == 0 and ir._any_step(1, 0) == STRIDED and ir._any_step(1, INDIRECT) == INDIRECT


def test_values_of_types_and_of_two_ways():
    whole = ir._top("tensor<4x1xi16, #blocked>")
    assert (whole.low, whole.high, whole.steps) == (-(2**15), 2**15 - 1, (STRIDED, 0))
    assert (ir._top("i1").low, ir._top("i1").high) == (0, 1) and ir._top("tensor<4xi8>", varies=False).steps == (0,)
    widened = ir._widened(Value(0, 2**40, (1,), "muli"), "tensor<4xi32>")
    assert (widened.low, widened.high, widened.steps, widened.wrapped) == (-(2**31), 2**40, (1,), "muli")
    joined = ir._join(Value(0, 5, (1, 2), None, "x"), Value(-3, 2, (1, 3), "addi", None))
    assert joined == Value(-3, 5, (1, STRIDED), "addi", "x")
    assert ir._fitted("addi", (0, 2**31 - 1), (), None, "i32") == Value(0, 2**31 - 1)
    left = ir._fitted("addi", (-(2**31) - 1, 0), (1,), None, "tensor<4xi32>")
    assert left == Value(-(2**31), 2**31 - 1, (1,), "addi in 32 bits, up to 2,147,483,649")
    assert ir._fitted("addi", (0, 2**31), (), "muli", "i32").wrapped == "muli", "the first that left"
    assert ir._fitted("muli", (0, 2**40), (), None, "i64") == Value(0, 2**40)
