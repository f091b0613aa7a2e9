"""Times, launches and bytes of a function, and the facts about a machine that stand beside them."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.cases.benchmark import stand_in_cuda  # noqa: F401  (a fixture)

from benchmarks.harness import measure
from benchmarks.harness.measure import Times

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves on."""
    found = SimpleNamespace(now=0.0, calls=0)
    monkeypatch.setattr(time, "perf_counter", lambda: found.now)

    def run() -> None:
        found.calls += 1
        found.now += 2e-3

    found.run = run
    return found


def test_a_failed_capture_gives_the_stream_back(monkeypatch):
    """`torch.cuda.graph` does not, where ending the capture raises."""
    current = ["before"]

    class Graph:
        def __init__(self, graph, stream):
            self.stream = stream

        def __enter__(self):
            current[0] = self.stream

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="previous error"):
        measure.Replay(lambda: None, torch.device("cuda", 0), "side")
    assert current == ["before"]


def test_quantiles_are_interpolated():
    assert measure.times_of([5.0, 1.0, 4.0, 2.0, 3.0]) == Times(*map(pytest.approx, (1.8, 3.0, 4.2)))


@pytest.mark.parametrize(("seconds", "repeats"), [(0.1, 50), (0.001, 5), (9, 200)])
def test_calls_of_two_milliseconds_fill_the_seconds_within_bounds(clock, seconds, repeats):
    times = measure.call_times(clock.run, CPU, seconds)
    assert times == Times(*[pytest.approx(2.0)] * 3)
    assert clock.calls == 2 + repeats, "two find out how long one takes"


def test_a_replay_is_timed_by_many_copies_with_a_warm_cache_and_by_one_with_a_flushed(
    clock, stand_in_cuda, monkeypatch
):
    """Captured, a run takes a tenth of its 2 ms, and each launch of a graph another 0.1."""

    class Graph:
        def replay(self):
            clock.now += 1e-4 + 2e-4 * self.runs

    class Capture:
        def __init__(self, graph, stream):
            self.graph = graph

        def __enter__(self):
            self.before = clock.calls

        def __exit__(self, *_):
            self.graph.runs = clock.calls - self.before

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    replay = measure.Replay(clock.run, GPU, None)
    assert (replay.once.runs, replay.copies, replay.many.runs) == (1, 6, 6), "2 ms hold six launches of 0.3"
    assert replay.times(0.0, flushed=True) == Times(*[pytest.approx(0.3)] * 3)
    assert replay.times(0.0, flushed=False) == Times(*[pytest.approx((0.1 + 6 * 0.2) / 6)] * 3)


def test_a_buffer_exceeds_the_cache_four_times_and_is_never_small(monkeypatch):
    for l2, size in ((2**27, 2**29), (2**20, 2**28)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, l2=l2: SimpleNamespace(L2_cache_size=l2)
        )
        assert measure._flush_buffer.__wrapped__(torch.device("meta")).nbytes == size


def test_memory_and_launches_are_a_gpus(stand_in_cuda, monkeypatch):
    assert measure.peak_bytes(lambda: None, GPU) == 60, "above what was allocated before"
    assert measure.peak_bytes(lambda: None, CPU) is None
    monkeypatch.undo()
    assert measure.launches(lambda: torch.ones(2) + 1, CPU) is None
    total = re.search(r"MemTotal: *(\d+) kB", Path("/proc/meminfo").read_text())
    assert measure.free_bytes(CPU) == pytest.approx(1024 * int(total[1]) / 4, rel=0.05)


def test_a_copy_reads_and_writes(monkeypatch):
    """128 MiB in 2 ms."""
    monkeypatch.setattr(measure, "call_times", lambda run, device, seconds: (run(), Times(1.0, 2.0, 3.0))[1])
    assert measure.copy_bandwidth.__wrapped__(CPU) == pytest.approx(2 * 2**27 / 2e-3)


def test_the_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.delenv("SGG_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    source = tmp_path / "sgg_fast" / "a.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    without_git = measure.commit()
    (tmp_path / "README.md").write_text("not a source\n")
    assert measure.commit() == without_git and without_git.startswith("sources-")
    source.write_text("x = 2\n")
    assert measure.commit() != without_git

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert measure.commit() == git("rev-parse", "--short=12", "HEAD")
    source.write_text("x = 3\n")
    assert measure.commit() == f"{git('rev-parse', '--short=12', 'HEAD')}-dirty"
    monkeypatch.setenv("SGG_COMMIT", "abc")
    assert measure.commit() == "abc"


def test_clocks_are_what_nvidia_smi_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$4" = 1 ] && echo "1980, 2619"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.gpu_clocks(torch.device("cuda", 1)) == "1980/2619"
    assert measure.gpu_clocks(GPU) == "", "it fails there"
    monkeypatch.setenv("PATH", "")
    assert measure.gpu_clocks(GPU) == "" == measure.gpu_clocks(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_facts_of_this_machine():
    facts = measure.environment()
    assert facts["device"] == f"CPU, {torch.get_num_threads()} threads" and facts["torch"] == torch.__version__
    assert facts["cuda"] is None and "memory_bytes" not in facts
    heading = measure.heading(CPU)
    assert all(str(facts[name]) in heading for name in ("device", "cpu", "torch", "triton", "commit"))
    assert measure._version("no-such-package") == "absent"
