"""`python -m benchmarks.aot`: its baselines, what it counts as wrong, and its exit code."""

from __future__ import annotations

import dataclasses
import json

from benchmarks.aot import __main__ as aot
from benchmarks.aot import cases as aot_cases
from benchmarks.aot.compile import Compiled
from benchmarks.aot.rules import CHIPS

GOOD = Compiled("sm_89", "case", "some_kernel", 100, 512, 4, 20, 16, ())


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


def test_committed_baselines_cover_every_chip():
    for arch in CHIPS:
        assert json.loads(aot.baseline_path(arch).read_text())["arch"] == arch


def test_exit_code_and_one_line_a_violation(monkeypatch, capsys):
    bad = dataclasses.replace(GOOD, problems=("stack of 8 bytes", "local memory: LDL"))
    monkeypatch.setattr(aot_cases, "shipped_kernels", lambda: {"some_kernel"})
    for rows, code in (([GOOD], 0), ([GOOD, bad], 1)):
        monkeypatch.setattr(aot, "compile_in_process", lambda arch, pattern, rows=rows: rows)
        assert aot.main(["--arch", "sm_89"]) == code
    shown = capsys.readouterr().out
    assert "  sm_89 case some_kernel: stack of 8 bytes\n  sm_89 case some_kernel: local memory: LDL\n" in shown


def test_a_case_is_compiled_and_its_kernels_are_listed(capsys):
    """In a process of its own; both kernels of the gate keep the rules."""
    assert aot.main(["--arch", "sm_89", "--case", "geglu odd"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("geglu odd")]
    assert [row[3] for row in rows] == ["geglu_fwd_kernel", "geglu_bwd_kernel"]
    assert all(0 < int(row[4]) <= 255 and int(row[6]) > 0 for row in rows), "registers and warps"
    assert "sm_89: 1 cases, 2 launches, 2 kernels, 0 wrong" in shown


def test_the_table_marks_faults():
    bad = dataclasses.replace(GOOD, case="a case with a longer name", problems=("stack of 8 bytes",))
    head, good, other = aot.table([GOOD, bad]).splitlines()
    assert good.split() == ["case", "some_kernel", "100", "512", "4", "20", "16"] and other.endswith("16  !")
    for word, number in (("regs", "100"), ("shared", "512"), ("resident", "20"), ("B/lane", "16")):
        end = head.index(word) + len(word)
        assert good[:end].endswith(number), "under its name"


def test_a_report_compares_and_updates(tmp_path, monkeypatch, capsys):
    """--update writes what --check then accepts."""
    monkeypatch.setattr(aot, "BASELINES", tmp_path)
    monkeypatch.setattr(aot, "compile_in_process", lambda arch, pattern: [GOOD])
    monkeypatch.setattr(aot_cases, "shipped_kernels", lambda: {"some_kernel"})
    assert aot.main(["--arch", "sm_89", "--check"]) == 1
    assert aot.main(["--arch", "sm_89", "--update"]) == 0
    assert aot.main(["--arch", "sm_89", "--check"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["aot_sm_89.json"]
    assert "no baseline" in capsys.readouterr().out
