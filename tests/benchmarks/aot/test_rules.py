"""`benchmarks.aot.rules`: a chip's limits, what machine code tells, and tools that are missing."""

from __future__ import annotations

import os
import pathlib

import pytest
from support.aot.modules import assembled
from support.aot.programs import at_lane, entry

from benchmarks.aot import __main__ as aot
from benchmarks.aot import rules as aot_rules
from benchmarks.aot.compile import Compiled
from benchmarks.aot.rules import (
    CHIPS,
    AotError,
    Budget,
    Resources,
    access_bytes,
    budget_problems,
    code_problems,
    in_fresh_process,
    resident_warps,
)


def test_occupancy_by_hand():
    """65 536 registers, in units of 256 a warp: 168 a thread give 12 warps, 32 give every slot."""
    ada, ampere = CHIPS["sm_89"], CHIPS["sm_86"]
    assert resident_warps(ada, Budget(168, 0, 1)) == 12
    assert resident_warps(ada, Budget(32, 0, 4)) == 48
    assert resident_warps(ampere, Budget(32, 0, 1)) == 16  # one block a slot
    assert resident_warps(ada, Budget(32, 40 * 1024, 4)) == 8  # 41 of 100 KB a block
    assert budget_problems(ada, Budget(32, 99 * 1024, 4), 1, 4) == []
    assert "the limit is 99 KB" in budget_problems(ada, Budget(32, 99 * 1024 + 1, 4), 1, 4)[0]
    assert budget_problems(ada, Budget(168, 0, 1), 128 * 12, 16) == [], "a grid of 12 warps an SM needs no 16"
    assert "12 resident warps" in budget_problems(ada, Budget(168, 0, 1), 128 * 13, 16)[0]


def test_unreadable_machine_code_is_an_error():
    with pytest.raises(AotError, match="cuobjdump"):
        aot_rules.read_cubin(b"not a cubin")


def test_without_cuobjdump_the_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(pathlib.Path, "is_file", lambda path: False)
    monkeypatch.setattr(aot_rules.shutil, "which", lambda name: None)
    with pytest.raises(AotError, match="cuobjdump is neither at"):
        aot_rules.read_cubin(b"")
    monkeypatch.undo()

    def fail(arch: str, pattern: str) -> list[Compiled]:
        raise AotError(f"{arch}: cuobjdump is neither here nor there")

    monkeypatch.setattr(aot, "compile_in_process", fail)
    assert aot.main(["--arch", "sm_89", "--check"]) == 1
    assert "not checked: sm_89: cuobjdump is neither" in capsys.readouterr().out


def test_machine_code_tells_its_resources():
    """Of PTX by hand: an atomic, local memory behind a run-time address, and a product in double precision."""
    plain = aot_rules.read_cubin(assembled(entry("\tst.global.b32 [%rd1], %r1;", 1)))
    assert 0 < plain.registers <= 32 and plain.stack == 0 and {"EXIT", "STG.E"} <= plain.opcodes
    assert code_problems(plain) == []
    atomic = aot_rules.read_cubin(
        assembled(entry("\tatom.global.add.u32 %r3, [%rd1], %r1;\n\tst.global.b32 [%rd1], %r3;", 1))
    )
    assert [problem.split(".")[0] for problem in code_problems(atomic)] == ["atomic: ATOMG"]
    double = "\tld.global.b64 %rd3, [%rd1];\n\tmul.f64 %rd3, %rd3, %rd3;\n\tst.global.b64 [%rd1], %rd3;"
    assert code_problems(aot_rules.read_cubin(assembled(entry(double, 1)))) == ["double precision: DMUL"]
    local = at_lane(4, "%rd1", "%rd10") + """
	mov.b64 %SPL, __local_depot0;
	ld.global.b32 %r5, [%rd10];
	mul.wide.u32 %rd11, %r5, 4;
	add.s64 %rd11, %rd11, %SPL;
	st.local.b32 [%SPL], %r1;
	st.local.b32 [%SPL+4], %r2;
	ld.local.b32 %r6, [%rd11];
	st.global.b32 [%rd10], %r6;"""  # fmt: skip
    spilled = aot_rules.read_cubin(assembled(entry(local, 1, local=64)))
    assert spilled.stack == 64
    stack, memory = code_problems(spilled, 63)
    assert stack == "stack of 64 bytes" and memory.startswith("local memory: LDL") and "STL" in memory
    assert code_problems(spilled, 64) == [], "what a chip may need"


def test_faults_of_machine_code_by_hand():
    resources = Resources(40, 0, frozenset({"EXIT", "LDL.64", "REDG.E.ADD", "F2F.F64.F32", "FADD"}))
    assert code_problems(resources, 40) == [
        "local memory: LDL.64",
        "atomic: REDG.E.ADD",
        "double precision: F2F.F64.F32",
    ]


def test_bytes_of_a_lane_by_hand():
    ptx = """
	ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
	ld.global.L1::evict_last.b16 %rs1, [%rd1];
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
	st.global.v2.f32 [%rd1], {%r1, %r2};"""
    assert access_bytes(ptx, "ld") == [16, 2] and access_bytes(ptx, "st") == [8]


def test_a_fresh_process_has_no_interpreter_and_its_death_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert in_fresh_process(os.getenv, "TRITON_INTERPRET", "none") == "none"
    with pytest.raises(AotError, match=r"^3: its process died: "):
        in_fresh_process(os._exit, 3)
    aot_rules._without_interpreter()
    assert "TRITON_INTERPRET" not in os.environ
