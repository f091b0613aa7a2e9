"""What the benchmark harness says and does, held against the launches and processes themselves."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from sgg_kernels import launch
from sgg_kernels.gather_add_relu import gather_add_relu_bwd
from sgg_kernels.scatter_mean import scatter_mean_bwd

from benchmarks import gpu_suite, run
from benchmarks.counts import roofline
from benchmarks.harness import measure
from benchmarks.harness.output import OpRow
from benchmarks.ops import baselines as baselines_torch
from benchmarks.ops import registry, timing
from benchmarks.ops.cases import Case
from benchmarks.ops.registry import Shape


@pytest.mark.parametrize("num", [1, 77, 256, 5000, 10**6])
def test_counted_rows_of_a_bias_gradient_are_those_allocated(num):
    """`issued` has a formula for the fp32 rows between the two stages; the launchers have the tensors."""
    width, seen = 8, []

    def see(kernel, grid, args, options):
        given = dict(zip(kernel.arg_names, args, strict=False))
        seen.append((kernel.__name__, given.get("program_sum_ptr", given["partial_ptr"]).numel()))
        return True

    def index(*sizes: int) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=torch.int32, device="meta") for size in sizes]

    def rows(size: int, columns: int) -> torch.Tensor:
        return torch.empty(size, columns, device="meta")

    shape, itemsize = Shape(1, num, num, num, num, width), 4
    with launch.intercept(see):
        scatter_mean_bwd(rows(num, 8), rows(num, 8), rows(num, 24), rows(1, 24)[0], *index(num, num, num + 1))
    streams = 9 * num * width * itemsize + 3 * 2 * 4 * num
    assert seen == [(name, seen[0][1]) for name in ("scatter_mean_bwd_kernel", "column_sum_kernel")]
    assert roofline.issued("scatter_mean", True, shape, itemsize) - streams == 2 * 4 * seen[0][1]
    seen.clear()
    with launch.intercept(see):
        gather_add_relu_bwd(rows(num, 8), rows(num, 8), *index(num, num, num + 1, num, 2 * num), torch.float32)
    streams = 7 * num * width * itemsize + 4 * (2 * num + 1 + 2 * num)
    assert roofline.issued("gather_add_relu", True, shape, itemsize) - streams == 2 * 4 * seen[-1][1]


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="POSIX sessions")
def test_a_child_that_left_its_session_does_not_hold_the_suite(tmp_path):
    """It keeps the log's pipe open after its parent's process group was killed."""
    child = "import subprocess; subprocess.Popen(['sleep', '30'], start_new_session=True)"
    start = time.monotonic()
    status = gpu_suite.run_limited((sys.executable, "-c", child), dict(os.environ), tmp_path / "log.txt", 20)
    assert status == "passed" and time.monotonic() - start < 15


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


def test_what_reads_sizes_back_is_never_captured(monkeypatch):
    """The reference of `pack` synchronises: a capture of it would fail, and take memory from the later cases."""

    def forbidden(*_):
        raise AssertionError("a capture was tried")

    stand_in = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("peak_bytes", "launches", "call_times"):
        monkeypatch.setattr(measure, name, lambda *_: None)
    monkeypatch.setattr(measure, "gpu_clocks", lambda device: "")
    monkeypatch.setattr(measure, "Replay", forbidden)
    monkeypatch.setattr(timing, "_timed", lambda row, *_, **changes: dataclasses.replace(row, **changes))
    case = Case("pack", "fwd", "tiny", "int32", 8)
    plan = timing.BenchSettings(torch.device("cuda", 0), ("reference",), 0.0, 0.0)
    row = OpRow(case.op, case.mode, case.size, "", case.dtype, "reference", "eager", "warm")
    form = baselines_torch.form("pack", "reference")
    rows = list(timing._time_on_cuda(row, form, case, registry.inputs(case, "cpu"), None, plan))
    assert [(r.call, r.status) for r in rows[:2]] == [("eager", "ok")] * 2
    assert (rows[2].call, rows[2].status) == ("replay", "not capturable: reads sizes back to the host")


NOT_HERE = "skipped: the tensors are on cpu, and Triton needs CUDA (or TRITON_INTERPRET=1, its slow interpreter)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize(
    ("interpret", "wrong", "status", "code"),
    [
        (
            "0",
            False,
            NOT_HERE,
            0,
        ),
        ("1", False, "verified", 0),
        ("1", True, "failed: RuntimeError: broken", 1),
    ],
)
@pytest.mark.parametrize("op", ["graph_mean", "pack"])
def test_ours_is_skipped_where_it_cannot_run_and_fails_where_it_is_broken(
    monkeypatch, tmp_path, op, interpret, wrong, status, code
):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    if wrong:
        monkeypatch.setitem(baselines_torch.FORMS, (op, "ours"), broken)
    words = f"--device cpu --quick --verify-only --size tiny --mode fwd --backend ours reference --op {op} --out"
    assert run.main([*words.split(), str(tmp_path)]) == code
    with (tmp_path / "verify.csv").open(newline="") as file:
        rows = {row["backend"]: row["status"] for row in csv.DictReader(file)}
    assert rows == {"ours": status, "reference": "verified"}
