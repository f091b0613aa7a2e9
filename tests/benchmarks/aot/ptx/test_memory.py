"""`benchmarks.aot.ptx.memory`: global memory keeps to its bounds, and races and unwritten reads are found."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from support.aot.programs import aligned, at_lane, entry, run, words

from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.memory import Memory
from benchmarks.aot.ptx.program import PtxError


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


def test_an_access_may_reach_several_buffers():
    """Even lanes read and write one array, odd lanes another; an array that is added twice is one buffer."""
    one, two = words(), aligned(np.arange(32, dtype="u4"))
    want = one.copy(), two.copy()
    for x, first in zip(want, (0, 1), strict=True):
        x[first::2] += 5
    body = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11") + """
	and.b32 %r5, %r1, 1;
	setp.eq.b32 %p1, %r5, 0;
	selp.b64 %rd12, %rd10, %rd11, %p1;
	ld.global.b32 %r6, [%rd12];
	add.s32 %r6, %r6, 5;
	st.global.b32 [%rd12], %r6;"""  # fmt: skip
    memory = Memory(True, collections.Counter())
    for x in (one, two, two):
        memory.add(x.ctypes.data, x.nbytes, "array", x.itemsize)
    memory.add(1, 0, "nothing")
    assert len(memory.buffers) == len(memory.bases) == 2 and memory.bases == sorted(memory.bases)
    Kernel(entry(body, 2), 0).launch((1, 1, 1), [one.ctypes.data, two.ctypes.data], memory)
    assert np.array_equal(one, want[0]) and np.array_equal(two, want[1]) and not memory.notes
