"""`benchmarks.aot.run`: Triton's own programs on the PTX machine, and faults planted in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import pinned

from benchmarks.aot import run as running
from benchmarks.aot.cases import cases, shipped_kernels
from benchmarks.aot.ptx.program import PtxError
from benchmarks.aot.rules import AotError

ROOT = Path(__file__).resolve().parents[3]


def command(*line: str) -> subprocess.CompletedProcess:
    """A Python process in which Triton compiles."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "tests"))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    return subprocess.run([sys.executable, *line], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pinned
def test_two_chips_share_a_program(capsys):
    """One runs it, and its row says so of the other."""
    code = running.main(["--arch", "sm_86", "sm_80", "--case", "geglu odd", "--counts", "--verbose"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    rows = {line.split()[0]: line.split()[1:6] for line in shown.splitlines() if line[:7].strip() in ("sm_86", "sm_80")}
    assert "sm_86 geglu odd bfloat16" in shown and "equal" in shown
    assert rows["sm_86"] == ["1", "1", "0", "2", "2"] and rows["sm_80"] == ["1", "0", "1", "2", "2"]
    assert "geglu_fwd_kernel" in shown and "useful" in shown


def test_the_table_in_the_readme_has_a_row_for_every_kernel():
    rows = [line.split("`")[1] for line in running.TABLE.committed().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(name.removesuffix("_kernel") for name in shipped_kernels()), running.TABLE.typed
    assert set(running.COUNTED) <= {case.name for case in cases()}


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_the_machine_counts():
    done = command("-m", "benchmarks.aot.run", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def planted(kind: str, *names: str) -> list[list[str]]:
    done = command("tests/support/aot/mutants.py", kind, *names)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pinned
def test_barriers_left_out_are_caught():
    """All but one of each shifted program, which order nothing between warps.

    With a shift the forward exchanges the group's mean through shared memory twice: the second store writes the same
    registers to the same places as the first, so nobody can read another value (the machine asks whether a store
    changes what it overwrites). The backward's barrier stands between a warp's load of its own 16 bytes and the store
    of the same warp into the same 16; the lanes meet in shuffles before.
    """
    found = planted("barrier", "group_norm_silu odd bfloat16")
    assert len(found) >= 40
    missed = [row[1] for row in found if not row[3]]
    most = {"group_norm_silu_fwd_kernel": 1, "group_norm_silu_bwd_kernel": 2}  # without and with a gradient beside it
    assert all(missed.count(kernel) <= most.get(kernel, 0) for kernel in missed), found
    assert all("barrier" in row[3] for row in found if row[3].startswith("machine")), found


def test_masks_off_by_one_and_wrong_strides_are_caught():
    """Every wrong stride. Some comparisons change nothing by one more (a loop's last turn adds masked rows)."""
    strides = planted("stride", "geglu odd bfloat16")
    assert len(strides) >= 3 and all(row[3] for row in strides), strides
    masks = planted("off by one", "geglu odd bfloat16")
    assert len(masks) >= 2 and sum(bool(row[3]) for row in masks) >= 0.5 * len(masks), masks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["barrier", "off by one", "stride"])
def test_faults_in_more_kernels(kind):
    """In the kernels with shared memory every barrier; of the others, what the LOG lists."""
    names = ("scatter_mean odd bf16", "group_norm_silu odd large bfloat16", "masked_pool odd bf16", "adam paper")
    found = planted(kind, *names)
    caught = sum(bool(row[3]) for row in found)
    print(f"{kind}: {caught} of {len(found)}")
    assert found and (caught == len(found) if kind == "barrier" else caught >= 0.5 * len(found)), found


def test_a_block_without_a_reason_fails_and_one_with_a_reason_does_not(capsys):
    def result(source: str) -> running.Result:
        made = running.Result("sm_89", programs={"a": ["case: pack_fwd_kernel"]}, ran=["a"], cases={"case": ""})
        made.entered, made.sources = {"a": [3] * 99 + [0]}, {"a": [""] * 99 + [source]}
        return made

    path = ROOT / "kernels" / "sgg_kernels" / "pack.py"
    lines = path.read_text().splitlines()
    division = next(i for i, line in enumerate(lines, 1) if "//" in line and "tl." not in line and "#" not in line)
    assert running.report([result(f"pack.py:{division}:7")], whole=True) == []
    assert "64-bit division" in capsys.readouterr().out
    (wrong,) = running.report([result("pack.py:1:0")], whole=True)
    assert "without a reason" in wrong


def test_what_does_not_run_or_differs_is_wrong():
    made = running.Result(
        "sm_89", programs={"a": ["case: k"], "b": ["other: k"]}, ran=["a"], cases={"case": "off by 1"}
    )
    assert running.report([made], whole=True) == ["sm_89 case: off by 1", "sm_89 other: k: no run"]


def test_the_table_is_the_counts_of_its_cases(monkeypatch):
    """They come from one process; a case that is wrong gives no table."""
    asked, cells = [], [str(n) for n in range(len(running.COLUMNS))]
    result = running.Result("sm_89", cases={"geglu": "", "adam": ""}, cells=[cells])
    monkeypatch.setattr(running, "in_fresh_process", lambda *given: asked.append(given) or result)
    head, _, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in running.body().splitlines()]
    assert head == list(running.COLUMNS) and row == cells
    assert asked == [(running.work, "sm_89", set(), "", True, running.COUNTED)]
    result.cases["geglu"] = "off by 1"
    with pytest.raises(AotError, match=r"^geglu: off by 1$"):
        running.body()


@pytest.mark.parametrize("kind", [AssertionError, PtxError])
def test_the_outcome_of_a_run_is_one_line(kind):
    def wrong() -> None:
        raise kind("off by 1\nand more")

    assert running._outcome(wrong) == f"{kind.__name__}: off by 1" and running._outcome(lambda: None) == ""
    with pytest.raises(ZeroDivisionError):
        running._outcome(lambda: 1 / 0)
