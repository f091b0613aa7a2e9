"""`benchmarks.aot.mlir`: a module's operations, blocks, constants and layouts, from its text."""

from __future__ import annotations

import pytest
from support.aot.modules import LOOP, module

from benchmarks.aot import mlir


def test_integers_of_operations_come_from_the_text():
    """Triton 3.6 gives a walk no integer attributes; 3.7 and 3.8 print them the same way."""
    text = """module {
  tt.func public @k(%x: !tt.ptr<f32>) {
    %0 = tt.get_program_id x : i32
    %1 = tt.make_range {end = 128 : i32, start = 0 : i32} : tensor<128xi32>
    %2 = tt.expand_dims %1 {axis = 1 : i32} : tensor<128xi32> -> tensor<128x1xi32>
    %3 = tt.get_num_programs y : i32
    %4 = tt.make_range {end = 8 : i32, start = 4 : i32} : tensor<4xi32>
    %5 = "tt.reduce"(%1) <{axis = 0 : i32}> ({
    }) : (tensor<128xi32>) -> i32
  }
}"""
    assert mlir.numbered(text) == {
        "tt.get_program_id": [{"axis": 0}],
        "tt.get_num_programs": [{"axis": 1}],
        "tt.make_range": [{"end": 128, "start": 0}, {"end": 8, "start": 4}],
        "tt.expand_dims": [{"axis": 1}],
    }
    op = mlir.Op("tt.make_range", [], [], [], {"end": 8})
    assert op.number("end") == 8
    with pytest.raises(ValueError, match=r"^tt.make_range has no attribute start$"):
        op.number("start")


def test_layouts_of_tensors():
    """Blocked ones, slices of them, and the sums of an mma.sync; the lanes of any other are not known."""
    blocked = "#ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [2, 16], warpsPerCTA = [4, 1], order = [1, 0]}>"
    assert mlir.parse_layout(f"tensor<16x64xf32, {blocked}>") == mlir.LaneLayout((1, 4), (2, 16), (1, 0))
    for dim, layout in ((0, mlir.LaneLayout((4,), (16,), (0,))), (1, mlir.LaneLayout((1,), (2,), (0,)))):
        assert mlir.parse_layout(f"tensor<16xf32, #ttg.slice<{{dim = {dim}, parent = {blocked}}}>>") == layout
    sums = "#ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>"
    assert mlir.parse_layout(f"tensor<64x64xf32, {sums}>") == mlir.LaneLayout((1, 2), (8, 4), (1, 0))
    assert mlir.parse_layout("tensor<64x64xf32, #ttg.linear<{register = []}>>") is None


@pytest.mark.parametrize(
    ("text", "shape", "bits", "size"),
    [("tensor<16x128x!tt.ptr<f32>, #blocked>", (16, 128), None, 4), ("tensor<512xi64, #blocked>", (512,), 64, 1),
     ("i1", (), 1, 1), ("f32", (), None, 1), ("!tt.ptr<bf16>", (), None, 2), ("!tt.ptr<i1>", (), None, 1),
     ("tensor<8xi8>", (8,), 8, 1)],
)  # fmt: skip
def test_types(text, shape, bits, size):
    assert (mlir.shape_of(text), mlir.integer_bits(text), mlir.item_bytes(text)) == (shape, bits, size)


def test_a_module_is_its_operations_by_block():
    """A loop is one operation of the first block, and has a block of its own with three arguments."""
    found = mlir.Module(LOOP)
    first = found.blocks[found.entry]
    assert [op.name for op in first if op.name.startswith(("scf", "tt."))] == [
        "tt.make_range", "tt.splat", "tt.addptr", "tt.splat", "scf.for", "tt.splat", "tt.addptr", "tt.store",
        "tt.return",
    ]  # fmt: skip
    (loop,) = (op for op in first if op.name == "scf.for")
    (inside,) = loop.blocks
    assert [op.name for op in found.blocks[inside]] == ["tt.load", "arith.addf", "tt.addptr", "scf.yield"]
    assert len(found.arguments[found.entry]) == 4 and len(found.arguments[inside]) == 3
    load, add, *_, leave = found.blocks[inside]
    counter, total, pointer = found.arguments[inside]
    assert load.operands == [pointer] and add.operands == [total, load.results[0][0]]
    assert leave.operands[0] == add.results[0][0] and found.types[counter] == "i32"
    assert found.types[pointer].startswith("tensor<512x!tt.ptr<f32>, #ttg.blocked<")
    assert first[-2].operands[1] == loop.results[0][0] and mlir.shape_of(loop.results[1][1]) == (512,)
    assert sorted(found.constants.values(), key=str) == [0, 1, None], "zeros of floats are no integer"
    (span,) = (op for op in first if op.name == "tt.make_range")
    assert (span.number("start"), span.number("end")) == (0, 512)


def test_constants():
    text = """
    %a = arith.constant true
    %b = arith.constant dense<-7> : tensor<4xi32>
    %c = arith.constant {tt.x = 1 : i32} 12 : i64
    %d = arith.constant 1.5 : f32
    %e = arith.constant dense<[1, 2]> : tensor<2xi32>"""
    assert mlir._constants(text) == [1, -7, 12, None, None]


def test_two_functions_are_refused():
    text = module("")
    function = text[text.index("  tt.func") : text.rindex("}")]
    text = text.replace(function, function + function.replace("@kernel", "@other"))
    with pytest.raises(ValueError, match="expected one function of one block, found 2 blocks"):
        mlir.Module(text)
