"""The cells of `benchmarks.quality`: runs that are cut and go on, the same noise for all, failures alone."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import os
import signal
import sys

import pytest
from support.cases.benchmark import SYSTEM, TINY

from benchmarks.quality import cells as quality_cells
from benchmarks.quality.plan import Cell, Pretraining


def test_a_killed_comparison_goes_on_and_redoes_nothing(compared):
    out, seen = compared
    before, after = seen["first"], seen["last"]
    made = {path for path in before if "checkpoints" not in path and not path.startswith("results")}
    text, sgg = (Cell(SYSTEM[name], 0).folder(out).relative_to(out) for name in ("text, zero-shot", "sgg"))
    assert f"{text}/eval/eval.json" in made and f"{sgg}/eval/eval.json" not in made
    assert any(path.startswith(f"{sgg}/eval/pictures") for path in made), "it was cut after its pictures"
    assert any(path.startswith("pretrained/whole/seed-0") for path in made)
    assert {path: before[path] for path in made} == {path: after[path] for path in made}
    assert f"{sgg}/eval/eval.json" in after
    assert not list(out.glob("cells/*/*/finetune/checkpoints")), "a finished cell needs none"


def test_systems_are_judged_from_the_same_noise_and_say_how_to_repeat_them(compared):
    out, _ = compared
    cells = [Cell(SYSTEM[name], 0).folder(out) for name in ("text, zero-shot", "sgg")]
    names = [sorted(p.relative_to(c).as_posix() for p in c.glob("eval/pictures/seed-*/*.png")) for c in cells]
    assert names[0] == names[1] and {name.split("/")[2] for name in names[0]} == {"seed-0", "seed-1"}
    commands = [(c / "eval.command").read_text().split(" --data")[1] for c in cells]
    assert commands[0] == commands[1]
    told = (cells[1] / "finetune.command").read_text()
    assert "--stage finetune" in told and "--ema 0.0" in told and "pretrained/whole/seed-0" in told
    before = Pretraining.of(Cell(SYSTEM["sgg"], 0))
    assert "--recipe toy-words --stage pretrain" in (before.folder(out) / "pretrain.command").read_text()


def test_a_cell_that_cannot_run_fails_alone(tmp_path):
    """Without the training set nothing can train; each cell says so and the rest is still tried."""
    cells = [Cell(SYSTEM["sgdiff"], 0), Cell(SYSTEM["text, sentence"], 0)]
    ended: list[object] = []
    failed = quality_cells.run_all(tmp_path, TINY, cells, {}, 1, lambda task, seconds: ended.append(task))
    assert len(failed) == 2 and not ended
    assert all("there is no such folder" in line for line in failed)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_ends_with_the_process_that_started_it():
    kernel, signal_of, get, put = ctypes.CDLL(None), ctypes.c_int(), 2, 1
    try:
        quality_cells._begin_worker(os.getppid())
        kernel.prctl(get, ctypes.byref(signal_of))
        assert signal_of.value == signal.SIGTERM
        with pytest.raises(SystemExit):
            quality_cells._begin_worker(-1)  # it died before the worker could ask
    finally:
        kernel.prctl(put, 0)


def test_several_jobs_share_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    with quality_cells._executor(1) as here:
        assert here.submit(os.getpid).result() == os.getpid() and "OMP_NUM_THREADS" not in os.environ
    with quality_cells._executor(3) as pool:
        assert isinstance(pool, concurrent.futures.ProcessPoolExecutor)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("2", "PASSIVE")


def test_speeds_are_measured_and_leave_no_run_behind(words_foundation, tmp_path, monkeypatch):
    small = {"width": 32, "num_layers": 1, "resolution": 32, "token_init": "none"}
    monkeypatch.setattr(quality_cells, "COMMON", {**quality_cells.COMMON, **small})
    monkeypatch.setattr(quality_cells, "LEAST", dataclasses.replace(quality_cells.LEAST, draw_steps=1))
    speeds = quality_cells.measure(tmp_path, {"model": str(words_foundation)})
    assert 0 < speeds.pretrain_graph < speeds.finetune_image < 5 and 0 < speeds.draw_step < 5
    assert [path.name for path in tmp_path.iterdir()] == ["measure.log"]
