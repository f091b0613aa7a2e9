"""The ahead-of-time check itself: each rule catches a kernel that breaks it, and nothing is passed over in silence."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from support import ROOT

from benchmarks.aot import __main__ as aot
from benchmarks.aot import cases as aot_cases
from benchmarks.aot import mlir
from benchmarks.aot import rules as aot_rules
from benchmarks.aot.compile import Compiled
from benchmarks.aot.rules import CHIPS, AotError, Budget, budget_problems, resident_warps

GOOD = Compiled("sm_89", "case", "some_kernel", 100, 512, 4, 20, 16, ())


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, list[str]]:
    """Case of `aot_toys.py` -> its problems, compiled for sm_89 by a process without the interpreter."""
    out = tmp_path_factory.mktemp("aot") / "toys.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "support" / "aot_toys.py"), "sm_89", str(out)]
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


def test_baseline(tmp_path):
    """Registers may differ by 10 %, shared memory not; a kernel more or less is a difference."""
    path, other = tmp_path / "aot.json", dataclasses.replace(GOOD, kernel="other_kernel")
    assert "no baseline" in aot.baseline_diff("sm_89", [GOOD], path)[0]
    aot.write_baseline("sm_89", [GOOD, other], path)
    assert aot.baseline_diff("sm_89", [GOOD, other], path) == []
    for registers, lines in ((110, 0), (90, 0), (111, 1), (89, 1)):
        changed = dataclasses.replace(GOOD, registers=registers)
        assert len(aot.baseline_diff("sm_89", [changed, other], path)) == lines
    changed = dataclasses.replace(GOOD, registers=150, shared=513)
    assert aot.baseline_diff("sm_89", [changed, other], path) == [
        "sm_89 case some_kernel: registers 100 -> 150 (+50 %)",
        "sm_89 case some_kernel: shared 512 -> 513 bytes",
    ]
    assert "no longer launched" in aot.baseline_diff("sm_89", [GOOD], path)[0]
    assert (
        "not in the baseline" in aot.baseline_diff("sm_89", [GOOD, other, dataclasses.replace(GOOD, case="x")], path)[0]
    )


def test_baseline_of_some_cases(tmp_path):
    """Rows of other cases stay, and are not missed."""
    path, adam = tmp_path / "aot.json", dataclasses.replace(GOOD, case="adam paper")
    aot.write_baseline("sm_89", [GOOD, adam, dataclasses.replace(adam, case="adam old")], path)
    changed = dataclasses.replace(adam, registers=200)
    assert "no longer launched" in aot.baseline_diff("sm_89", [adam], path, "adam")[0]
    aot.write_baseline("sm_89", [changed], path, "adam")
    assert aot.baseline_diff("sm_89", [changed], path, "adam") == []
    assert aot.baseline_diff("sm_89", [GOOD, changed], path) == []


def test_a_forgotten_kernel_is_a_violation(tmp_path):
    (tmp_path / "a.py").write_text(
        "@triton.jit\ndef helper(x):\n    return x\n\n@triton.jit\ndef one_kernel(x):\n    helper(x)\n"
    )
    (tmp_path / "b.py").write_text("@triton.jit(do_not_specialize=['x'])\ndef two_kernel(x):\n    pass\n")
    shipped = aot_cases.shipped_kernels(tmp_path)
    assert shipped == {"one_kernel", "two_kernel"}
    compiled = [dataclasses.replace(GOOD, kernel="one_kernel")]
    assert aot.violations(compiled, shipped) == [
        "sm_89 two_kernel: a kernel that no case launches (benchmarks/aot/cases.py)"
    ]


def test_every_shipped_kernel_declares_its_occupancy():
    assert aot_cases.shipped_kernels() == set(aot_cases.LEAST_WARPS)


def test_committed_baselines_cover_every_chip():
    for arch in CHIPS:
        assert json.loads(aot.baseline_path(arch).read_text())["arch"] == arch


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


def test_unreadable_machine_code_is_an_error():
    with pytest.raises(AotError, match="cuobjdump"):
        aot_rules.read_cubin(b"not a cubin")


def test_exit_code_and_one_line_a_violation(monkeypatch, capsys):
    bad = dataclasses.replace(GOOD, problems=("stack of 8 bytes", "local memory: LDL"))
    monkeypatch.setattr(aot_cases, "shipped_kernels", lambda: {"some_kernel"})
    for rows, code in (([GOOD], 0), ([GOOD, bad], 1)):
        monkeypatch.setattr(aot, "compile_in_process", lambda arch, pattern, rows=rows: rows)
        assert aot.main(["--arch", "sm_89"]) == code
    shown = capsys.readouterr().out
    assert "  sm_89 case some_kernel: stack of 8 bytes\n  sm_89 case some_kernel: local memory: LDL\n" in shown


def test_the_interpreter_is_refused(monkeypatch):
    from benchmarks.aot.compile import use_chip

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AotError, match="TRITON_INTERPRET"):
        use_chip("sm_89")
