"""`benchmarks.aot.compile`: each rule catches a kernel that breaks it, and nothing is passed over in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from sgg_kernels.launch import launch
from support import ROOT
from support.aot.modules import ROW, made_by_hand
from triton.runtime import driver

from benchmarks.aot.cases import AotCase
from benchmarks.aot.compile import Compiled, compile_cases, judge, use_chip
from benchmarks.aot.rules import AotError


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, list[str]]:
    """Case of `support/aot/toys.py` -> its problems, compiled for sm_89 by a process without the interpreter."""
    out = tmp_path_factory.mktemp("aot") / "toys.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "support" / "aot" / "toys.py"), "sm_89", str(out)]
    done = subprocess.run(command, env={**env, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row["problems"] for row in json.loads(out.read_text())}


@pytest.mark.parametrize("case", ["right", "narrow but small", "gather", "advancing pointer", "pack padded masked"])
def test_sound_kernels_pass(toys, case):
    """The last of them ships."""
    assert toys[case] == []


@pytest.mark.parametrize(
    ("case", "reasons"),
    [
        ("narrow", ["load of x_ptr: 32-bit offset muli", "store of out_ptr: 32-bit offset muli"]),
        ("widened too late", ["load of x_ptr: 32-bit offset muli", "store of out_ptr: 32-bit offset muli"]),
        ("gather in 32 bits", ["load of x_ptr: 32-bit offset muli"]),
        ("advancing offset", ["load of x_ptr: 32-bit offset addi"]),
        ("strided", ["load of x_ptr: adjacent lanes are 3 elements", "store of out_ptr: adjacent lanes are 3"]),
        ("double", ["double precision: DMUL", "double precision: F2F"]),
        ("atomic", ["atomic: ATOMG"]),
        ("off alignment", ["loads of 4 bytes a lane"]),
        ("odd stride", ["loads of 4 bytes a lane"]),
        ("scattered floats", ["no occupancy declared", "load of x_ptr: adjacent lanes are indirect"]),
        ("spill", ["stack of", "local memory: LDL", "8 resident warps (255 registers"]),
        ("few warps", ["12 resident warps"]),
        ("fails", ["does not compile: CompilationError"]),
        ("no launch", ["the case launches no kernel"]),
    ],
)
def test_each_rule_catches_its_kernel(toys, case, reasons):
    assert len(toys[case]) == len(reasons), toys[case]
    for problem, reason in zip(toys[case], reasons, strict=True):
        assert problem.startswith(reason)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AotError, match="TRITON_INTERPRET"):
        use_chip("sm_89")


def test_a_launch_is_judged_by_every_rule():
    """The resources are those of its machine code, the accesses those of its TTGIR with the launch's numbers."""
    kernel, compiled = made_by_hand(ROW, "\tld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1];", num_warps=4, shared=128)
    args = object(), object(), 512, 64, 7
    row = judge("sm_89", kernel, compiled, args, (1000,), 16, vectors=True)
    assert (row.arch, row.kernel, row.shared, row.num_warps, row.lane_bytes, row.problems) == (
        "sm_89", "copy_kernel", 128, 4, 16, (),
    )  # fmt: skip
    assert row.registers > 0 and row.resident == 48
    wide = judge("sm_89", kernel, compiled, args, (10_000_000,), None)
    assert [problem.split(",")[0] for problem in wide.problems] == [
        "no occupancy declared for this kernel (benchmarks/aot/cases.py",
        "load of x_ptr: 32-bit offset muli in 32 bits",
        "store of out_ptr: 32-bit offset muli in 32 bits",
    ]
    with pytest.raises(AotError, match=r"^copy_kernel was compiled for 89, not sm_90$"):
        judge("sm_90", kernel, compiled, args, (1000,), 16)


def test_the_stand_in_answers_as_its_chip(monkeypatch):
    """Its device number is the chip's too, because Triton keeps what it compiled by device."""
    taken: list = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(driver, "set_active", taken.append)
    for capability in (90, 120):
        use_chip(f"sm_{capability}")
        made = taken.pop()
        target = made.get_current_target()
        assert made.is_active() and (target.backend, target.arch, target.warp_size) == ("cuda", capability, 32)
        assert (made.get_current_device(), made.get_current_stream(capability)) == (capability, 0)
        assert made.get_active_torch_device().type == "cpu"
        for ask in (made.get_benchmarker, lambda made=made: made.map_python_to_cpp_type("i32")):
            with pytest.raises(NotImplementedError):
                ask()


def test_launches_of_a_case_are_numbered():
    """One that is declared and aligned keeps the rules; another has no occupancy, and loads 4 bytes a lane."""
    kernel, compiled = made_by_hand(ROW, "\tld.global.b32 %r3, [%rd1];", num_warps=4, shared=0)
    kernel.warmup = lambda *args, grid, **options: compiled
    args = object(), object(), 512, 64, 7

    def run() -> None:
        for _ in range(2):
            launch(kernel, (1000,), *args, num_warps=4)

    plain, vectors = AotCase("plain", run, False), AotCase("vectors", run, True)
    found = compile_cases("sm_89", [plain], {"copy_kernel": 16})
    assert [(row.key, row.problems) for row in found] == [("plain copy_kernel", ()), ("plain copy_kernel 2", ())]
    (_, row) = compile_cases("sm_89", [vectors], {})
    assert row.key == "vectors copy_kernel 2" and [problem.split("(")[0].strip() for problem in row.problems] == [
        "no occupancy declared for this kernel",
        "loads of 4 bytes a lane, though rows are aligned",
    ]


def test_a_case_that_fails_or_launches_nothing_is_a_row():
    def fails() -> None:
        raise RuntimeError("why\nin the end")

    found = compile_cases("sm_89", [AotCase("bad", fails, True), AotCase("none", lambda: None, True)], {})
    assert [(row.key, row.problems) for row in found] == [
        ("bad (no launch)", ("does not compile: RuntimeError: in the end",)),
        ("none (no launch)", ("the case launches no kernel",)),
    ]
    assert isinstance(found[0], Compiled)

    def unchecked() -> None:
        raise AotError("cuobjdump failed")

    with pytest.raises(AotError, match="cuobjdump failed"):
        compile_cases("sm_89", [AotCase("case", unchecked, True)], {})
