"""`benchmarks.aot.ptx.program`: the text of a kernel as blocks, registers and operands."""

from __future__ import annotations

import pytest
from support.aot.programs import entry, loop_body

from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.program import (
    Instruction,
    Program,
    PtxError,
    body_of,
    digest,
    home,
    operands,
    registers,
    size_of,
    split_operands,
)


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


def test_operands_and_registers():
    assert split_operands("{%r1, %r2}, [%rd1 + 4], 0f3F800000") == ["{%r1, %r2}", "[%rd1 + 4]", "0f3F800000"]
    assert split_operands("") == [] and split_operands("%p1|%p2") == ["%p1|%p2"]
    assert registers("{%r1, %rs22}") == {"r1", "rs22"} and registers("[%rd7+16]") == {"rd7"}
    assert registers("%p1|%p2") == {"p1", "p2"} and registers("%SPL") == {"SPL"} and registers("%tid.x") == set()
    assert [(home(name), size_of(home(name))) for name in ("p3", "rs1", "r20", "rd4", "SPL")] == [
        ("b", 1), ("u2", 2), ("u4", 4), ("u8", 8), ("u8", 8),
    ]  # fmt: skip
    with pytest.raises(PtxError, match="register %f1 is not known"):
        home("f1")
    store = Instruction(None, "st.global.v2.b32", ("[%rd1]", "{%r1, %r2}"), 12, "hand.py:3:5")
    assert store.parts == ["st", "global", "v2", "b32"] and operands(store) == (set(), {"rd1", "r1", "r2"})
    assert str(store.error("why")) == "line 12 (hand.py:3:5): st.global.v2.b32 [%rd1], {%r1, %r2}: why"


def test_blocks_follow_each_other_and_know_their_source():
    """A guarded branch may go on; a block whose instructions name no line has that of the block before."""
    program = Program(entry(loop_body(), 1))
    assert [program.successors(k) for k in range(6)] == [[1], [1, 2], [4, 3], [5], [5], []]
    assert set(program.sources()) == {""}, "line 0 is none"
    body = "\t.loc 1 5 3 // hand.py:5:3\n\tmov.b32 %r5, 1;\n\tbra $L__BB0_1;\n$L__BB0_1:\n\t.loc 1 1 0 // hand.py:1:0\n"
    body += "\tmov.b32 %r6, 1;\n\tbar.sync 0;\n\t.loc 1 6 1 // hand.py:6:1 @[ hand.py:9:2 ]\n\tmov.b32 %r7, 1;"
    program = Program(entry(body, 1, threads=64, local=48))
    assert program.sources() == ["hand.py:5:3", "hand.py:5:3", "hand.py:6:1 @[ hand.py:9:2 ]"]
    assert (program.name, program.threads, program.local_bytes, program.labels) == ("kernel", 64, 48, {"$L__BB0_1": 1})
    assert program.params == [("u64", "kernel_param_0")]


def test_a_statement_may_take_several_lines():
    (block,) = Program(entry("\tadd.s32 %r5,\n\t%r1, 1; @!%p1 mov.b32 {%rs1,\n%rs2}, %r5; // and a note", 0)).blocks
    add, move = block[-3:-1]
    assert (add.op, add.args, add.predicate) == ("add.s32", ("%r5", "%r1", "1"), None)
    assert (move.op, move.args, move.predicate) == ("mov.b32", ("{%rs1, %rs2}", "%r5"), ("p1", True))
    with pytest.raises(PtxError, match=r"cannot read '123 %r5'"):
        Program(entry("\t123 %r5;", 0))
