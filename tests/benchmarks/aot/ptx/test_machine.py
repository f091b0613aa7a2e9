"""Memory, warps, divergence and barriers of the PTX machine, from PTX by hand; and the faults it must find."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from support.ptx_programs import aligned, at_lane, entry, run

from benchmarks.aot.ptx.counts import Row, Traffic
from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.memory import Memory
from benchmarks.aot.ptx.program import Program, PtxError, body_of, digest, operands

LANES = np.arange(32, dtype="u4")


def words(num: int = 32) -> np.ndarray:
    return aligned(np.arange(1, num + 1, dtype="u4") * 0x01010101)


WIDTHS = [("", 8), ("", 16), ("", 32), ("", 64), (".v2", 16), (".v2", 32), (".v2", 64), (".v4", 8), (".v4", 16),
          (".v4", 32), (".v8", 32)]  # fmt: skip


@pytest.mark.parametrize(("vector", "width"), WIDTHS)
@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_every_width_of_every_memory(space, vector, width):
    """In through global memory, through `space`, and out again."""
    num = int(vector[2:] or 1)
    size = num * width // 8
    kind = {8: "rs", 16: "rs", 32: "r", 64: "rd"}[width]
    regs = ", ".join(f"%{kind}{50 + i}" for i in range(num))
    regs = f"{{{regs}}}" if num > 1 else regs
    one = aligned(np.random.default_rng(0).integers(0, 256, 32 * size, dtype="u1"))
    two = aligned(np.zeros_like(one))
    form = f"{vector}.b{width}"
    body = at_lane(size, "%rd1", "%rd10") + at_lane(size, "%rd2", "%rd11")
    body += f"\tld.global{form} {regs}, [%rd10];\n"
    if space == "shared":
        body += f"\tmul.lo.u32 %r9, %r1, {size};\n\tst.shared{form} [%r9], {regs};\n\tbar.sync 0;\n"
        body += f"\tld.shared{form} {regs}, [%r9];\n"
    elif space == "local":
        body += "\tmov.b64 %SPL, __local_depot0;\n\tcvta.local.u64 %SP, %SPL;\n\tadd.s64 %rd12, %SPL, 0;\n"
        body += f"\tst.local{form} [%rd12+32], {regs};\n\tld.local{form} {regs}, [%rd12+32];\n"
    body += f"\tst.global{form} [%rd11], {regs};"
    kernel = run(body, one, two, shared=32 * size, local=64)
    assert np.array_equal(one, two) and not kernel.notes


def test_a_narrow_load_fills_its_register():
    x, out = aligned(np.array([-3] * 32, "i1")), aligned(np.zeros(32, "i4"))
    body = at_lane(1, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11")
    run(body + "\tld.global.s8 %r5, [%rd10];\n\tst.global.b32 [%rd11], %r5;", x, out)
    assert (out == -3).all()
    run(body + "\tld.global.u8 %r5, [%rd10];\n\tst.global.b32 [%rd11], %r5;", x, out)
    assert (out == 253).all()


def test_a_guard_keeps_loads_and_stores_of_other_lanes_back():
    x, out = words(), aligned(np.full(32, 7, "u4"))
    body = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11") + """
	setp.lt.u32 %p1, %r1, 10;
	setp.lt.u32 %p2, %r1, 20;
	mov.b32 %r5, 99;
	@%p1 ld.global.b32 %r5, [%rd10];
	@!%p1 add.s32 %r5, %r5, 1;
	@%p2 st.global.b32 [%rd11], %r5;"""  # fmt: skip
    run(body, x, out)
    assert np.array_equal(out, np.where(LANES < 10, x, np.where(LANES < 20, 100, 7)))


def test_pieces_of_registers():
    out = aligned(np.zeros(32, "u8"))
    body = at_lane(8, "%rd1", "%rd10") + """
	mov.b32 %r5, 0x12345678;
	mov.b32 {%rs1, %rs2}, %r5;
	mov.b32 %r6, {%rs2, %rs1};
	mov.b64 %rd11, {%r6, %r5};
	mov.b64 {_, %r7}, %rd11;
	mov.b64 %rd11, {%r6, %r7};
	st.global.b64 [%rd10], %rd11;"""  # fmt: skip
    run(body, out)
    assert (out == 0x1234567856781234).all()


def loop_body() -> str:
    """out[lane] = sum of 0 .. lane, each lane leaving the loop when it is done; odd lanes then add 1000."""
    return (
        at_lane(4, "%rd1", "%rd10")
        + """
	mov.b32 %r5, 0;
	mov.b32 %r6, 0;
$L__BB0_1:
	add.s32 %r6, %r6, %r5;
	add.s32 %r5, %r5, 1;
	setp.le.u32 %p1, %r5, %r1;
	@%p1 bra $L__BB0_1;
	and.b32 %r7, %r1, 1;
	setp.eq.b32 %p2, %r7, 0;
	@%p2 bra $L__BB0_3;
	add.s32 %r6, %r6, 1000;
	bra.uni $L__BB0_4;
$L__BB0_3:
	add.s32 %r6, %r6, 0;
$L__BB0_4:
	st.global.b32 [%rd10], %r6;"""
    )


def test_lanes_part_and_meet_again():
    out = aligned(np.zeros(32, "u4"))
    kernel = run(loop_body(), out)
    assert np.array_equal(out, LANES * (LANES + 1) // 2 + 1000 * (LANES % 2))
    assert kernel.executed.tolist() == [1, 32, 1, 1, 1, 1], "warps that entered each block"


def test_ctas_and_early_return():
    out = aligned(np.zeros(5 * 64, "u4"))
    body = """
	setp.eq.b32 %p1, %r2, 3;
	@%p1 ret;
	mad.lo.s32 %r5, %r2, 64, %r1;
	mul.wide.u32 %rd10, %r5, 4;
	add.s64 %rd10, %rd10, %rd1;
	mov.u32 %r6, %nctaid.x;
	st.global.b32 [%rd10], %r6;"""
    run(body, out, threads=64, ctas=5)
    assert np.array_equal(out.reshape(5, 64)[:, 0], [5, 5, 5, 0, 5])


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


EXCHANGE = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11") + """
	ld.global.b32 %r5, [%rd10];
	shl.b32 %r6, %r1, 2;
	st.shared.b32 [%r6], %r5;
	{barrier}
	xor.b32 %r7, %r6, {other};
	ld.shared.b32 %r8, [%r7];
	st.global.b32 [%rd11], %r8;"""  # fmt: skip
"""Each of 64 threads reads what another wrote: 128 is one of the other warp, 4 the neighbour."""


COPIES = at_lane(16, "%rd1", "%rd10") + at_lane(16, "%rd2", "%rd11") + """
	mul.lo.u32 %r6, %r1, 16;
	setp.eq.s32 %p1, %r1, 3;
	selp.b32 %r9, 0, 16, %p1;
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd10 + 0 ], 0x10, %r9;
	cp.async.commit_group;
	cp.async.ca.shared.global [ %r6 + 1024 ], [ %rd10 + 1024 ], 0x10;
	cp.async.commit_group;
	{wait}
	{barrier}
	xor.b32 %r7, %r6, {other};
	ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r7+{second}];
	st.global.v4.b32 [%rd11], {{%r20, %r21, %r22, %r23}};"""  # fmt: skip
"""Each of 64 threads copies 16 bytes in each of two groups, none for thread 3 in the first, and reads another's."""

ARRIVED = {"wait": "cp.async.wait_group 1;", "barrier": "bar.sync 0;", "other": 512, "second": 0}


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


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"wait": ""}, "unfinished copy"),
        ({"second": 1024}, "unfinished copy"),
        ({"barrier": ""}, "no barrier between"),
    ],
)
def test_a_copy_that_was_not_waited_for_is_found(changed, fault):
    """No wait, a wait for the group before, and a wait that orders only the thread's own copies."""
    x, out = words(512), aligned(np.zeros(256, "u4"))
    kernel = run(COPIES.format(**ARRIVED | changed), x, out, threads=64, shared=2048)
    assert fault in str(kernel.notes)


def test_a_barrier_orders_warps():
    x, out = words(64), aligned(np.zeros(64, "u4"))
    kernel = run(EXCHANGE.format(barrier="bar.sync 0;", other=128), x, out, threads=64, shared=256)
    assert np.array_equal(out, np.roll(x, 32)) and not kernel.notes


def test_a_missing_barrier_is_found():
    x, out = words(64), aligned(np.zeros(64, "u4"))
    kernel = run(EXCHANGE.format(barrier="", other=128), x, out, threads=64, shared=256)
    assert "no barrier between" in str(kernel.notes)
    kernel = run(EXCHANGE.format(barrier="", other=4), x, out, threads=64, shared=256)
    assert not kernel.notes, "within a warp"


def test_a_missing_barrier_before_the_next_write_is_found():
    body = EXCHANGE.format(barrier="bar.sync 0;", other=128) + "\n\tadd.s32 %r5, %r5, 1;\n\tst.shared.b32 [%r6], %r5;"
    kernel = run(body, words(64), aligned(np.zeros(64, "u4")), threads=64, shared=256)
    assert "over what another warp reads" in str(kernel.notes)


def test_a_barrier_that_part_of_a_cta_leaves_out_is_found():
    body = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 bra $L__BB0_2;\n\tbar.sync 0;\n\tbra.uni $L__BB0_3;\n"
    body += "$L__BB0_2:\n\tbar.sync 0;\n$L__BB0_3:\n\tmov.b32 %r5, 1;"
    assert "different barriers" in str(run(body, words(64), threads=64).notes)
    body = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 exit;\n\tbar.sync 0;\n\tmov.b32 %r5, 1;"
    assert "left behind" in str(run(body, words(64), threads=64).notes)


def copy(offset: int = 0, guard: int = 32, stride: int = 4, width: int = 32) -> str:
    """out[lane] = in[lane + offset] for the lanes below `guard`, addresses `stride` bytes apart."""
    return at_lane(stride, "%rd1", "%rd10") + at_lane(stride, "%rd2", "%rd11") + f"""
	setp.lt.u32 %p1, %r1, {guard};
	mov.b32 %r5, 0;
	@%p1 ld.global.b{width} %r5, [%rd10+{offset}];
	@%p1 st.global.b{width} [%rd11], %r5;"""  # fmt: skip


@pytest.mark.parametrize(
    ("body", "reason"),
    [(copy(guard=31), "past the end"), (copy(offset=64), "outside of every buffer"),
     (copy(offset=2), "does not divide"), (copy(stride=8), "outside of every buffer"),
     (copy(stride=6), "does not divide")],
    ids=["off by one", "bounds", "alignment", "stride", "odd stride"],
)  # fmt: skip
def test_an_access_outside_of_its_buffer_raises(body, reason):
    """An off-by-one mask and a wrong stride among them; buffers of 30 and 40 words."""
    raw = aligned(np.zeros(400, "u4"))  # far apart in one block, so that what is past one is not in the other
    one, two = raw[:40], raw[200:230]
    if "outside" in reason or "divide" in reason:
        two = raw[200:232]
    with pytest.raises(PtxError, match=reason):
        run(body, one, two)


def test_the_right_mask_does_not_raise():
    raw = aligned(np.arange(400, dtype="u4"))
    run(copy(guard=30), raw[:40], raw[200:230])
    assert np.array_equal(raw[200:230], raw[:30]) and raw[230] == 230


def test_reads_may_use_what_an_allocator_rounds_up_and_writes_may_not():
    raw = aligned(np.zeros(400, "u4"))
    run(copy(guard=32), raw[:30], raw[200:232])
    with pytest.raises(PtxError, match="outside of every buffer"):
        run(copy(guard=32), raw[:28], raw[200:232])


def test_a_read_of_what_nothing_wrote_is_found():
    kernel = run(copy(), words(), aligned(np.zeros(32, "u4")), unwritten=(0,))
    assert "nothing wrote in array 0" in str(kernel.notes)
    twice = copy() + "\n\tld.global.b32 %r6, [%rd11];"
    assert not run(twice, words(), aligned(np.zeros(32, "u4")), unwritten=(1,)).notes
    kernel = run("\tmov.b32 %r5, 0;\n\tld.shared.b32 %r6, [%r5];", words(), shared=64)
    assert "shared memory that nothing wrote" in str(kernel.notes)
    kernel = run("\tmov.b64 %SPL, __local_depot0;\n\tld.local.b32 %r6, [%SPL];", words(), local=16)
    assert "local memory that nothing wrote" in str(kernel.notes)


@pytest.mark.parametrize(
    ("body", "reason"),
    [("\tst.shared.b32 [%r6], %r1;", "outside of the 64 bytes"), ("\tst.shared.b32 [%r1], %r1;", "does not divide")],
)
def test_bounds_of_shared_memory(body, reason):
    with pytest.raises(PtxError, match=reason):
        run(f"\tshl.b32 %r6, %r1, 2;\n{body}", words(), shared=64)


def test_bounds_of_local_memory():
    with pytest.raises(PtxError, match="local memory"):
        run("\tmov.b64 %SPL, __local_depot0;\n\tst.local.b64 [%SPL+16], %rd1;", words(), local=16)


CTAS_WRITE = """
	and.b32 %r5, %r1, 31;
	mul.wide.u32 %rd10, %r5, 4;
	add.s64 %rd10, %rd10, %rd1;
	{what}"""


@pytest.mark.parametrize(
    ("what", "reason"),
    [("st.global.b32 [%rd10], %r2;", "write"), ("ld.global.b32 %r6, [%rd10];\n\tst.global.b32 [%rd10], %r2;", "CTA"),
     ("st.global.b32 [%rd10], 5;", None), ("ld.global.b32 %r6, [%rd10];", None),
     ("st.global.b32 [%rd1], %r1;", "different values")],
)  # fmt: skip
def test_races_between_ctas(what, reason):
    """Two that write the same value to a place, or only read it, are none."""
    kernel = run(CTAS_WRITE.format(what=what), words(), ctas=3)
    assert (reason in str(kernel.notes)) if reason else not kernel.notes


def test_a_warp_instruction_reached_by_part_of_a_warp_raises():
    body = "\tsetp.lt.u32 %p1, %r1, 10;\n\t@%p1 bra $L__BB0_2;\n\tshfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n$L__BB0_2:\n"
    with pytest.raises(PtxError, match="part of a warp"):
        run(body, words())
    run("\tbar.warp.sync -1;", words())


def test_addresses_out_of_a_table_are_asked_for():
    x, table, out = words(), aligned(np.zeros(2, "u8")), aligned(np.zeros(32, "u4"))
    table[0] = x.ctypes.data
    body = "\tld.global.b64 %rd9, [%rd1];\n" + at_lane(4, "%rd9", "%rd10") + at_lane(4, "%rd2", "%rd11")
    text = entry(body + "\tld.global.b32 %r5, [%rd10];\n\tst.global.b32 [%rd11], %r5;", 2)
    memory, asked = Memory(True, collections.Counter()), []
    for y in (table, out):
        memory.add(y.ctypes.data, y.nbytes, "argument")
    memory.resolve = lambda address: asked.append(address) or (x.ctypes.data, x.nbytes)
    Kernel(text, 0).launch((1, 1, 1), [table.ctypes.data, out.ctypes.data], memory)
    assert np.array_equal(out, x) and asked == [x.ctypes.data]


def test_launching_with_a_parameter_too_few_raises():
    with pytest.raises(PtxError, match="1 arguments for 2 parameters"):
        Kernel(entry("", 2), 0).launch((1, 1, 1), [0], Memory(True, collections.Counter()))


@pytest.mark.parametrize(
    "text", ["", ".func (.reg .b32 %r1) f()", ".visible .entry k(\n)\n{\n ret;\n}", entry("\tmov b32 {;", 1)]
)
def test_text_that_is_not_a_program_raises(text):
    with pytest.raises(PtxError):
        Kernel(text, 0)


def test_liveness_and_digest():
    text = entry(loop_body(), 1)
    program = Program(text)
    assert "r6" in program.live_out[1] and "p1" not in program.live_out[1]
    assert operands(program.blocks[-1][0]) == (set(), {"rd10", "r6"})
    assert digest(text, 0) == digest(text.replace("sm_89", "sm_90"), 0) != digest(text, 16)
    assert "sm_89" not in body_of(text)


def row_of(kernel: Kernel) -> Row:
    row = Row("hand")
    kernel.add_to(row)
    return row


@pytest.mark.parametrize(("stride", "sectors", "share"), [(4, 4, 1), (8, 8, 0.5), (32, 32, 0.125)])
def test_sectors_and_their_useful_share(stride, sectors, share):
    big = aligned(np.zeros(400, "u4"))
    body = at_lane(stride, "%rd1", "%rd10") + "\tld.global.b32 %r5, [%rd10];"
    loads = row_of(run(body, big, count=True)).loads
    assert (loads.requests, loads.sectors, loads.useful / (32 * loads.sectors)) == (1, sectors, share)


@pytest.mark.parametrize(("stride", "width", "passes", "least"), [(4, 32, 1, 1), (8, 32, 2, 1), (128, 32, 32, 1),
                                                                  (8, 64, 2, 2), (16, 64, 4, 2)])  # fmt: skip
def test_bank_conflicts(stride, width, passes, least):
    source = "%rd1" if width == 64 else "%r1"
    body = f"\tmul.lo.u32 %r5, %r1, {stride};\n\tst.shared.b{width} [%r5], {source};"
    shared = row_of(run(body, words(), shared=4096, count=True)).shared
    assert (shared.requests, shared.sectors, shared.useful) == (1, passes, least)


def test_instructions_by_kind_and_barriers():
    body = EXCHANGE.format(barrier="bar.sync 0;", other=128)
    kernel = run(body, words(64), aligned(np.zeros(64, "u4")), threads=64, shared=256, count=True)
    row = row_of(kernel)
    assert row.warps == 2 and row.barriers == 2
    assert {k: n // 2 for k, n in row.instructions.items() if n} == {
        "integer": 6, "global": 2, "shared": 2, "move": 4, "control": 2,
    }  # fmt: skip
    assert not Traffic().by_instruction and "hand" in row.line()
