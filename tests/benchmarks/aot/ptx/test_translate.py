"""`benchmarks.aot.ptx.translate`: what an instruction does to registers, and the forms it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from support.aot.programs import LANES, aligned, at_lane, run, words

from benchmarks.aot.ptx.program import PtxError


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


@pytest.mark.parametrize(
    "line",
    ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};", "add.f64 %rd1, %rd2, %rd3;",
     "atom.global.add.f32 %r1, [%rd1], %r2;", "add.ftz.f32 %r1, %r2, %r3;", "cvt.rz.bf16.f32 %rs1, %r2;",
     "ld.b32 %r1, [%rd1];", "setp.eq.and.s32 %p1, %r1, %r2, %p2;", "bar.sync 1, 64;", "bar.arrive 0, 32;",
     "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 255;", "mov.b32 %r1, %clock;", "add.rz.f16x2 %r1, %r2, %r3;",
     "cp.async.cg.shared.global [%r1], [%rd1], 16;", "frobnicate.b32 %r1, %r2;", "call foo;"],
)  # fmt: skip
def test_an_unknown_form_raises(line):
    with pytest.raises(PtxError):
        run(f"\t{line}", np.zeros(4, "u4"))


def test_literals_and_low_bits():
    """Decimal, hexadecimal, negative and fp32 literals; a narrow store takes the low bits of its register."""
    out, halves = aligned(np.zeros((32, 4), "u4")), aligned(np.full(32, 7, "u2"))
    body = at_lane(16, "%rd1", "%rd10") + at_lane(2, "%rd2", "%rd11") + """
	mov.b32 %r5, -5;
	mov.u32 %r6, 0x89ABCDEFU;
	mov.b32 %r7, 0f3FC00000;
	add.f32 %r8, %r7, 0fBF800000;
	setp.eq.b32 %p1, %r5, 4294967291;
	and.pred %p1, %p1, true;
	@!%p1 mov.b32 %r8, 0;
	st.global.v4.b32 [%rd10], {%r5, %r6, %r7, %r8};
	st.global.b16 [%rd11], %r6;"""  # fmt: skip
    run(body, out, halves)
    assert out.view("i4")[:, 0].tolist() == [-5] * 32 and (out[:, 1] == 0x89ABCDEF).all()
    assert out.view("f4")[0, 2:].tolist() == [1.5, 0.5] and (halves == 0xCDEF).all()
    for operand, reason in (("0d3FF0000000000000", "double precision"), ("other_smem", "operand 'other_smem'")):
        with pytest.raises(PtxError, match=reason):
            run(f"\tmov.b64 %rd9, {operand};", out)


@pytest.mark.parametrize("guard", ["", "@%p1 ", "@!%p1 "])
def test_a_branch_follows_its_guard(guard):
    out = aligned(np.zeros(32, "u4"))
    body = at_lane(4, "%rd1", "%rd10") + f"""
	setp.lt.u32 %p1, %r1, 10;
	mov.b32 %r5, 1;
	{guard}bra $L__BB0_2;
	mov.b32 %r5, 2;
$L__BB0_2:
	bar.warp.sync -1;
	bar.sync 0;
	st.global.b32 [%rd10], %r5;"""  # fmt: skip
    run(body, out)
    taken = {"": True, "@%p1 ": LANES < 10, "@!%p1 ": LANES >= 10}[guard]
    assert np.array_equal(out, np.where(taken, 1, np.full(32, 2)))


def test_words_of_local_memory_keep_their_places():
    out = aligned(np.zeros((32, 2), "u4"))
    body = at_lane(8, "%rd1", "%rd10") + """
	mov.b64 %SPL, __local_depot0;
	cvta.local.u64 %SP, %SPL;
	add.s32 %r5, %r1, 100;
	st.local.v2.b32 [%SPL+8], {%r1, %r5};
	ld.local.b32 %r6, [%SPL+12];
	ld.local.b32 %r7, [%SPL+8];
	st.global.v2.b32 [%rd10], {%r6, %r7};"""  # fmt: skip
    run(body, out, local=16)
    assert np.array_equal(out, np.stack([LANES + 100, LANES], 1))


def test_registers_of_warp_instructions_keep_their_places():
    """Two matrices out and in again, the lane below's word, and the largest of the warp."""
    x, out = words(), aligned(np.zeros((32, 4), "u4"))
    body = at_lane(4, "%rd1", "%rd10") + at_lane(16, "%rd2", "%rd11") + """
	ld.global.b32 %r20, [%rd10];
	add.s32 %r21, %r20, 1;
	and.b32 %r8, %r1, 15;
	mul.lo.u32 %r9, %r8, 16;
	stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r9], {%r20, %r21};
	bar.sync 0;
	ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r22, %r23}, [%r9];
	shfl.sync.up.b32 %r24, %r20, 1, 0, -1;
	redux.sync.max.u32 %r25, %r20, -1;
	st.global.v4.b32 [%rd11], {%r22, %r23, %r24, %r25};"""  # fmt: skip
    run(body, x, out, shared=256)
    assert np.array_equal(out, np.stack([x, x + 1, np.concatenate([x[:1], x[:-1]]), np.full(32, x.max())], 1))


def test_registers_of_a_matrix_product_keep_their_places():
    """The identity times a matrix whose upper half is 2 and whose lower half is 3, plus c, into other registers.

    Registers 0 and 1 of c and d belong to the upper rows, 2 and 3 to the lower ones.
    """
    row, pair = LANES // 4, 2 * (LANES % 4)
    identity = aligned(np.where(row == pair, 0x3F80, 0) + np.where(row == pair + 1, 0x3F800000, 0).astype("u4"))
    c, d = aligned(np.arange(128, dtype="f4").reshape(32, 4)), aligned(np.zeros((32, 4), "f4"))
    body = at_lane(4, "%rd1", "%rd10") + at_lane(16, "%rd2", "%rd11") + at_lane(16, "%rd3", "%rd12") + """
	ld.global.b32 %r10, [%rd10];
	mov.b32 %r11, 0;
	mov.b32 %r14, 0x40004000;
	mov.b32 %r15, 0x40404040;
	ld.global.v4.b32 {%r16, %r17, %r18, %r19}, [%rd11];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r11, %r10}, {%r14, %r15}, {%r16, %r17, %r18, %r19};
	st.global.v4.b32 [%rd12], {%r20, %r21, %r22, %r23};"""  # noqa: E501  # fmt: skip
    run(body, identity.astype("u4"), c, d)
    assert np.array_equal(d, c + np.array([2, 2, 3, 3], "f4"))


def test_a_copy_takes_its_size_and_its_guard():
    """Lanes of size 0 get zeros, and lanes whose guard is false keep what they had."""
    x, out = words(), aligned(np.zeros(32, "u4"))
    body = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11") + """
	shl.b32 %r6, %r1, 2;
	st.shared.b32 [%r6+64], 7;
	setp.lt.u32 %p1, %r1, 10;
	setp.lt.u32 %p2, %r1, 20;
	selp.b32 %r9, 4, 0, %p1;
	@%p2 cp.async.ca.shared.global [%r6+64], [%rd10], 4, %r9;
	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.b32 %r5, [%r6+64];
	st.global.b32 [%rd11], %r5;"""  # fmt: skip
    kernel = run(body, x, out, shared=192)
    assert np.array_equal(out, np.where(LANES < 10, x, np.where(LANES < 20, 0, 7))) and not kernel.notes
