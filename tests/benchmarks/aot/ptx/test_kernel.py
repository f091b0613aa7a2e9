"""`benchmarks.aot.ptx.kernel`: which threads run when, what a launch takes, and what it counts."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from support.aot.programs import DOUBLED, LANES, aligned, at_lane, entry, loop_body, run, words

from benchmarks.aot.ptx.counts import Row
from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.memory import Memory
from benchmarks.aot.ptx.program import PtxError


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


def test_a_barrier_that_part_of_a_cta_leaves_out_is_found():
    body = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 bra $L__BB0_2;\n\tbar.sync 0;\n\tbra.uni $L__BB0_3;\n"
    body += "$L__BB0_2:\n\tbar.sync 0;\n$L__BB0_3:\n\tmov.b32 %r5, 1;"
    assert "different barriers" in str(run(body, words(64), threads=64).notes)
    body = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 exit;\n\tbar.sync 0;\n\tmov.b32 %r5, 1;"
    assert "left behind" in str(run(body, words(64), threads=64).notes)


def test_launching_with_a_parameter_too_few_raises():
    with pytest.raises(PtxError, match="1 arguments for 2 parameters"):
        Kernel(entry("", 2), 0).launch((1, 1, 1), [0], Memory(True, collections.Counter()))


def memory_of(*arrays: np.ndarray) -> Memory:
    memory = Memory(True, collections.Counter())
    for i, x in enumerate(arrays):
        memory.add(x.ctypes.data, x.nbytes, f"array {i}", x.itemsize)
    return memory


def test_a_sample_of_a_launch_is_spread_evenly_and_counted_apart():
    """Three of nine CTAs: the first, the last and the middle one. A launch without `count` adds to no row."""
    x, out = words(9 * 32), aligned(np.zeros(9 * 32, "u4"))
    kernel, row = Kernel(entry(DOUBLED, 2), 0), Row("hand_kernel")
    params = [x.ctypes.data, out.ctypes.data]
    kernel.launch((3, 3, 1), params, memory_of(x, out), sample=2)
    kernel.add_to(row)
    assert row.warps == sum(row.instructions.values()) == 0 and kernel.executed.tolist() == [2]
    out[:] = 0
    kernel.launch((9, 1, 1), params, memory_of(x, out), count=True, sample=3)
    ran = out.reshape(9, 32).any(axis=1)
    assert np.flatnonzero(ran).tolist() == [0, 4, 8] and np.array_equal(
        out.reshape(9, 32)[ran], 2 * x.reshape(9, 32)[ran]
    )
    kernel.add_to(row)
    assert row.warps == 3 and row.instructions["global"] == 6 and row.loads.requests == 3
    assert kernel.executed.tolist() == [5] and kernel.lane_steps == 5 * 32 * len(kernel.program.blocks[0])


def test_numbers_of_a_launch_are_its_parameters_bits():
    """Negative numbers and bits that are given as such; a register that nothing set holds zeros."""
    out = aligned(np.zeros((32, 4), "u8"))
    body = at_lane(32, "%rd1", "%rd10") + """
	setp.lt.u32 %p1, %r1, 5;
	@%p1 mov.b64 %rd20, 9;
	not.pred %p2, %p3;
	selp.b64 %rd21, %rd20, 1, %p2;
	st.global.v4.b64 [%rd10], {%rd2, %rd3, %rd20, %rd21};"""  # fmt: skip
    kernel = Kernel(entry(body, 3), 0)
    kernel.launch((1, 1, 1), [out.ctypes.data, -2, np.uint64(5)], memory_of(out))
    assert out[:5].tolist() == [[2**64 - 2, 5, 9, 9]] * 5 and out[5:].tolist() == [[2**64 - 2, 5, 0, 0]] * 27
