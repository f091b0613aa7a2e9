"""`benchmarks.gpu_suite`: parts in their order and within their limits; whatever hangs or fails loses no other part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from support import ROOT

from benchmarks import gpu_suite
from benchmarks.harness.output import read_rows
from benchmarks.ops import cases


def test_suite_keeps_going_and_kills_what_hangs(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('on', flush=True); time.sleep(600)"
    parts = (
        gpu_suite.Part("absent", (sys.executable, "-c", "1"), 9, needs=("no_such_package",)),
        gpu_suite.Part("hangs", (sys.executable, "-c", child), 2),
        gpu_suite.Part("fails", (sys.executable, "-c", "raise SystemExit(3)"), 30),
        gpu_suite.Part("works", (sys.executable, "-c", "print('fine')"), 30),
    )
    suite = gpu_suite.Suite(tmp_path, dry=False, parts=parts)
    suite.deadline = time.monotonic() + 62  # nothing to spare: the last two keep 60
    assert suite.run() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["status"] for part in summary["parts"]] == [
        "unavailable: not installed here: no_such_package", "failed: stopped after 2 s", "failed: exit 3", "passed",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json", "summary.json", "logs.tar.gz"}


def test_what_is_unavailable_turns_nothing_red(tmp_path):
    absent = gpu_suite.Part("absent", (sys.executable, "-c", "1"), 9, needs=("no_such_package",))
    assert gpu_suite.Suite(tmp_path, dry=False, parts=(absent,)).run() == 0


def test_the_headline_comes_first_and_the_limits_fit():
    names = [part.name for part in gpu_suite.PARTS]
    assert names[:3] == ["pretrain_step", "train_step", "infer"] and names[-1] == "regress"
    assert sum(part.seconds for part in gpu_suite.PARTS) <= gpu_suite.TOTAL_SECONDS - 10  # to start, and to write
    assert gpu_suite.TOTAL_SECONDS <= 9 * 60


def test_the_suite_begins_with_the_headlines_and_ends_with_the_regression_check():
    names = [part.name for part in gpu_suite.PARTS]
    assert names[:3] == ["pretrain_step", "train_step", "infer"] and names[-1] == "regress"
    files = {word for part in gpu_suite.PARTS for word in part.command if word.startswith("{out}/")}
    assert len(files | {"environment.json", "summary.json", "logs.tar.gz"}) <= gpu_suite.MAX_FILES


def test_a_part_may_use_what_those_before_it_left(tmp_path):
    """The first one needs none of its 6 seconds; the second is stopped after its own 1 and those."""
    limit = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    words = sys.executable, "-c", limit, str(tmp_path / "{soon}"), "x"
    first, last = gpu_suite.Part("first", words, 6), gpu_suite.Part("last", words, 3)
    suite = gpu_suite.Suite(tmp_path / "out", dry=False, parts=(first, last))
    suite.deadline = time.monotonic() + 40
    assert suite.run() == 0
    soon = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    assert len(soon) == 2 and soon[0] >= 20 and soon[1] >= soon[0]


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="POSIX sessions")
def test_a_child_that_left_its_session_does_not_hold_the_suite(tmp_path):
    """It keeps the log's pipe open after its parent's process group was killed."""
    child = "import subprocess; subprocess.Popen(['sleep', '30'], start_new_session=True)"
    start = time.monotonic()
    status = gpu_suite.run_limited((sys.executable, "-c", child), dict(os.environ), tmp_path / "log.txt", 20)
    assert status == "passed" and time.monotonic() - start < 15


def test_dry_suite_runs_end_to_end(tmp_path):
    """Its `tests` part is this very test run's collection; CI runs the whole of it by `make gpu-suite-dry`."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.gpu_suite",
        "--dry",
        "--out",
        str(tmp_path),
        "--parts",
        "verify",
        "bench",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"environment.json", "summary.json", "logs.tar.gz", "verify.csv", "bench.csv"}
    verified = read_rows(tmp_path / "verify.csv")
    assert {row["op"] for row in verified} == set(cases.OPS)
    assert {(row["backend"], row["status"], row["ms_p50"]) for row in verified} == {("ours", "verified", "")}
    assert not any(row["backend"] == "ours" for row in read_rows(tmp_path / "bench.csv"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_a_gpu_only_a_dry_run_starts(tmp_path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "gpu_suite: no CUDA device here: use --dry (make gpu-suite-dry)\n"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_has_no_gpu_and_interprets_kernels_only_where_they_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    names = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    code = f"import os; print('seen', *(os.environ.get(name, 'none') or 'empty' for name in {names}))"
    words = (sys.executable, "-c", code)
    parts = tuple(gpu_suite.Part(f"{k}", words, 9, dry=words, interpreted=bool(k)) for k in (0, 1))
    found = []
    for dry in (False, True):
        assert gpu_suite.Suite(tmp_path / str(dry), dry, parts).run() == 0
        with tarfile.open(tmp_path / str(dry) / "logs.tar.gz") as logs:
            found += [logs.extractfile(f"logs/{k}/log.txt").read().decode().strip() for k in (0, 1)]
    assert found == ["seen none 3", "seen none 3", "seen none empty", "seen 1 empty"]
