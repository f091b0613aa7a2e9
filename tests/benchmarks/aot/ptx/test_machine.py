"""`benchmarks.aot.ptx.machine`: what threads exchange within a warp, and copies that arrive later; from PTX by hand."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from support.aot.programs import ARRIVED, COPIES, LANES, aligned, at_lane, entry, run, words

from benchmarks.aot.ptx.machine import Machine
from benchmarks.aot.ptx.memory import Memory
from benchmarks.aot.ptx.program import Instruction, Program, PtxError


@pytest.mark.parametrize(
    ("kind", "by", "source"),
    [("bfly", 5, LANES ^ 5), ("idx", 9, np.full(32, 9)), ("up", 3, np.where(LANES < 3, LANES, LANES - 3)),
     ("down", 4, np.where(LANES > 27, LANES, LANES + 4)), ("idx", "%r1", LANES)],
)  # fmt: skip
def test_shuffles(kind, by, source):
    x, out = words(), aligned(np.zeros(32, "u4"))
    clamp = 0 if kind == "up" else 31
    body = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11")
    body += f"\tld.global.b32 %r5, [%rd10];\n\tshfl.sync.{kind}.b32 %r6, %r5, {by}, {clamp}, -1;\n"
    run(body + "\tst.global.b32 [%rd11], %r6;", x, out)
    assert np.array_equal(out, x[source])


@pytest.mark.parametrize(("form", "function"), [("add.s32", np.sum), ("min.s32", np.min), ("max.u32", np.max),
                                                ("and.b32", np.bitwise_and.reduce), ("or.b32", np.bitwise_or.reduce),
                                                ("xor.b32", np.bitwise_xor.reduce)])  # fmt: skip
def test_reductions(form, function):
    x = aligned(np.random.default_rng(1).integers(-1000, 1000, 64, dtype="i4"))
    out = aligned(np.zeros(64, "i4"))
    body = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11")
    body += f"\tld.global.b32 %r5, [%rd10];\n\tredux.sync.{form} %r6, %r5, -1;\n\tst.global.b32 [%rd11], %r6;"
    run(body, x, out, threads=64)
    rows = x.reshape(2, 32).view("u4" if "u32" in form else "i4")
    assert np.array_equal(out.view(rows.dtype).reshape(2, 32), np.repeat([[function(r)] for r in rows], 32, axis=1))


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_ldmatrix(num, trans):
    """Lane 4 i + j holds elements 2 j and 2 j + 1 of row i (of column i, transposed)."""
    x, out = aligned(np.arange(32 * 8, dtype="u2")), aligned(np.zeros(32 * num, "u4"))
    regs = ", ".join(f"%r{20 + i}" for i in range(num))
    body = at_lane(16, "%rd1", "%rd10") + at_lane(4 * num, "%rd2", "%rd11")
    body += "\tld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd10];\n\tmul.lo.u32 %r9, %r1, 16;\n"
    body += "\tst.shared.v4.b32 [%r9], {%r5, %r6, %r7, %r8};\n\tbar.sync 0;\n"
    body += f"\tldmatrix.sync.aligned.m8n8.x{num}{'.trans' * trans}.shared.b16 {{{regs}}}, [%r9];\n"
    body += "".join(f"\tst.global.b32 [%rd11+{4 * i}], %r{20 + i};\n" for i in range(num))
    kernel = run(body, x, out, shared=512)
    matrices = x.reshape(4, 8, 8)[:num]
    matrices = matrices.transpose(0, 2, 1) if trans else matrices
    want = np.ascontiguousarray(matrices).view("u4").reshape(num, 32).T
    assert np.array_equal(out.reshape(32, num), want) and not kernel.notes


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_stmatrix(num, trans):
    """Lane 4 i + j gives elements 2 j and 2 j + 1 of row i (of column i, transposed)."""
    matrices = np.arange(num * 64, dtype="u2").reshape(num, 8, 8)
    given = np.ascontiguousarray(matrices.transpose(0, 2, 1) if trans else matrices).view("u4").reshape(num, 32).T
    x, out = aligned(np.ascontiguousarray(given)), aligned(np.zeros(num * 64, "u2"))
    regs = ", ".join(f"%r{20 + i}" for i in range(num))
    body = at_lane(4 * num, "%rd1", "%rd10") + at_lane(4 * num, "%rd2", "%rd11")
    body += "".join(f"\tld.global.b32 %r{20 + i}, [%rd10+{4 * i}];\n" for i in range(num))
    body += f"\tand.b32 %r8, %r1, {8 * num - 1};\n\tmul.lo.u32 %r9, %r8, 16;\n"
    body += f"\tstmatrix.sync.aligned.m8n8.x{num}{'.trans' * trans}.shared.b16 [%r9], {{{regs}}};\n\tbar.sync 0;\n"
    body += f"\tmul.lo.u32 %r10, %r1, {4 * num};\n"
    for i in range(num):
        body += f"\tld.shared.b32 %r5, [%r10+{4 * i}];\n\tst.global.b32 [%rd11+{4 * i}], %r5;\n"
    kernel = run(body, x, out, shared=512)
    assert np.array_equal(out.reshape(num, 8, 8), matrices) and not kernel.notes


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_multiplies_matrices_of_a_warp(kind):
    """Two warps, by the fragments of PTX's manual (m16n8k16): lane 4 g + t holds of

    a rows g and g + 8 at k = 2 t, 2 t + 1 and 8 more; of b columns g at the same k; of c and d rows g and g + 8 at
    columns 2 t and 2 t + 1. d lies in the registers of c.
    """
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 9, shape) / 4 for shape in ((2, 16, 16), (2, 16, 8), (2, 16, 8)))
    words: dict[str, list] = {"a": [], "b": [], "c": []}

    def bits(low: float, high: float) -> int:
        pair = np.array([low, high])
        if kind == "f16":
            return int(pair.astype("f2").view("u4")[0])
        return int((pair.astype("f4").view("u4") >> 16).astype("u2").view("u4")[0])

    for warp in range(2):
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for row, k in ((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)):
                words["a"].append(bits(a[warp, row, k], a[warp, row, k + 1]))
            words["b"] += [bits(b[warp, k, g], b[warp, k + 1, g]) for k in (2 * t, 2 * t + 8)]
            words["c"] += [c[warp, row, 2 * t + i] for row in (g, g + 8) for i in (0, 1)]
    given = [aligned(np.array(words[name], t)) for name, t in (("a", "u4"), ("b", "u4"), ("c", "f4"))]
    body = at_lane(16, "%rd1", "%rd10") + at_lane(8, "%rd2", "%rd11") + at_lane(16, "%rd3", "%rd12")
    body += f"""
	ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd10];
	ld.global.v2.b32 {{%r14, %r15}}, [%rd11];
	ld.global.v4.b32 {{%r16, %r17, %r18, %r19}}, [%rd12];
	mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{ %r16, %r17, %r18, %r19 }}, {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }}, {{ %r16, %r17, %r18, %r19 }};
	st.global.v4.b32 [%rd12], {{%r16, %r17, %r18, %r19}};"""  # noqa: E501
    kernel = run(body, *given, threads=64)
    want = a @ b + c
    for warp in range(2):
        for lane in range(32):
            g, t = lane // 4, lane % 4
            rows = [want[warp, row, 2 * t + i] for row in (g, g + 8) for i in (0, 1)]
            assert given[2].reshape(2, 32, 4)[warp, lane].tolist() == rows
    assert not kernel.notes


def test_mma_needs_the_whole_warp():
    body = """
	setp.lt.u32 %p1, %r1, 16;
	@%p1 bra $L__BB0_1;
	ret;
$L__BB0_1:
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r16, %r17, %r18, %r19}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};"""  # noqa: E501
    with pytest.raises(PtxError, match="part of a warp"):
        run(body, words())


@pytest.mark.parametrize(
    "changed", [{}, {"wait": "cp.async.wait_group 0;", "second": 1024}, {"barrier": "", "other": 0}]
)
def test_copies_arrive(changed):
    x, out = words(512), aligned(np.zeros(256, "u4"))
    form = ARRIVED | changed
    kernel = run(COPIES.format(**form), x, out, threads=64, shared=2048)
    want = (x[256:] if form["second"] else x[:256]).reshape(64, 4).copy()
    if not form["second"]:
        want[3] = 0
    assert np.array_equal(out.reshape(64, 4), want[np.arange(64) ^ form["other"] // 16]) and not kernel.notes


def test_a_warp_instruction_reached_by_part_of_a_warp_raises():
    body = "\tsetp.lt.u32 %p1, %r1, 10;\n\t@%p1 bra $L__BB0_2;\n\tshfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n$L__BB0_2:\n"
    with pytest.raises(PtxError, match="part of a warp"):
        run(body, words())
    run("\tbar.warp.sync -1;", words())


def test_threads_know_their_place_in_the_grid():
    """Of CTAs 5 to 7 of a grid of 4 x 2 x 3, all or only some threads; others' registers stay as they are."""
    notes: collections.Counter[str] = collections.Counter()
    program = Program(entry("", 0, threads=64))
    machine = Machine(program, Memory(True, notes), np.arange(5, 8), (4, 2, 3), [], 256, notes, None)
    assert machine.num_lanes == 192 and machine.num_threads == 64
    assert (machine.grid_x, machine.grid_y, machine.grid_z) == (4, 2, 3)
    assert machine.lane.tolist() == list(range(5 * 64, 8 * 64)) and machine.tid.tolist() == [*range(64)] * 3
    places = [getattr(machine, f"cta_{axis}")[::64].tolist() for axis in "xyz"]
    assert places == [[1, 2, 3], [1, 1, 1], [0, 0, 0]]
    assert machine.cta_of_all().tolist() == [0] * 64 + [1] * 64 + [2] * 64
    where = np.arange(64, 96)
    machine.focus(where)
    assert machine.cta.tolist() == [1] * 32 and machine.tid.tolist() == [*range(32)]
    assert len(machine.cta_of_all()) == 192
    store, load = (Instruction(None, op, (), 1, "") for op in ("st.shared.b32", "ld.shared.b32"))
    machine.whole_warps(load)
    machine.store("shared", 4 * machine.tid, (machine.tid,), 4, machine.tid < 20, store)
    (found,) = machine.load("shared", 4 * machine.tid, 4, 1, machine.tid < 10, (np.full(32, 7, "u4"),), load)
    assert found.tolist() == [*range(10), *[7] * 22] and not notes
    kept = (np.zeros(32, "u4"),)
    assert machine.load("shared", 4 * machine.tid, 4, 1, np.False_, kept, load) is kept
    machine.focus(where[1:])
    with pytest.raises(PtxError, match="reached by part of a warp"):
        machine.whole_warps(load)
