"""Timed forms: checked first, then rows of calls and replays; whatever fails costs its own row only."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.cases.benchmark import on_cpu, small_case, stand_in_cuda  # noqa: F401  (a fixture)

from benchmarks import run
from benchmarks.harness import measure, verify
from benchmarks.harness.output import OpRow
from benchmarks.ops import baselines, cases, registry, timing
from benchmarks.ops.cases import Case


def _spoil(form, how):
    """`form` with a fault: in its values, in its gradients only, in one element, in its shape."""

    def spoiled(given, tensors):
        first, *rest = form(given, tensors)
        if how == "values":
            first = first * 1.01
        elif how == "gradient":
            first = first + (first - first.detach())
        elif how == "one element":
            first = first.clone()
            first[-1, -1] += 0.01
        elif how == "nan":
            first = torch.where(torch.arange(first.shape[1]) == 3, torch.nan, first)
        elif how == "shape":
            first = first[:-1]
        return (first, *rest)

    return spoiled


@pytest.mark.parametrize("how", ["values", "gradient", "one element", "nan", "shape"])
def test_a_wrong_result_prints_no_number(how):
    case = small_case("scatter_mean")
    given = registry.inputs(case, "cpu")
    form = _spoil(baselines.form("scatter_mean", "eager"), how)
    judge = verify.Judge(case, given)
    (row,) = timing.measure_form(case, given, judge, "eager", form, on_cpu())
    assert row.status.startswith("mismatch: ")
    assert row.ms_p20 is row.ms_p50 is row.ms_p80 is row.gb_s is row.copy_share is None


def test_one_failing_form_does_not_lose_the_rest():
    def broken(given, tensors):
        raise RuntimeError("out of luck\nand more")

    case = small_case("masked_pool")
    given = registry.inputs(case, "cpu")
    (row,) = timing.measure_form(case, given, verify.Judge(case, given), "ours", broken, on_cpu())
    assert row.status == "failed: RuntimeError: out of luck" and row.ms_p50 is None


@pytest.mark.parametrize("mode", cases.MODES)
def test_cuda_rows_are_calls_and_replays_warm_and_flushed(stand_in_cuda, mode):
    case, plan = small_case("scatter_mean", mode), on_cpu(device=torch.device("cuda", 0))
    given = registry.inputs(case, "cpu")
    judge, form = verify.Judge(case, given), baselines.form("scatter_mean", "eager")
    rows = list(timing.measure_form(case, given, judge, "eager", form, plan))
    kinds = [(row.call, row.l2) for row in rows]
    assert kinds == [("eager", "warm"), ("eager", "flushed"), ("replay", "warm"), ("replay", "flushed")]
    for row in rows:
        assert (row.status, row.device, row.launches, row.peak_bytes) == ("ok", "stand-in", 7, 60)
        assert row.ms_p20 <= row.ms_p50 <= row.ms_p80


def test_what_cannot_be_captured_or_replays_wrongly_says_so(stand_in_cuda, monkeypatch):
    case, plan = small_case("masked_pool", "fwd"), on_cpu(device=torch.device("cuda", 0))
    given = registry.inputs(case, "cpu")
    judge, form = verify.Judge(case, given), baselines.form("masked_pool", "eager")
    monkeypatch.setattr(
        measure.Replay, "_capture", lambda self, run, copies: (torch.cuda.CUDAGraph(), [torch.ones(2, 32)])
    )
    rows = list(timing.measure_form(case, given, judge, "eager", form, plan))
    assert rows[-1].status.startswith("mismatch in replay: ") and rows[-1].ms_p50 is None and len(rows) == 3

    def refused(self, run, copies):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure.Replay, "_capture", refused)
    rows = list(timing.measure_form(case, given, judge, "eager", form, plan))
    assert rows[-1].status == "not capturable: operation not permitted when stream is capturing"
    assert rows[-1].ms_p50 is None and [row.status for row in rows[:2]] == ["ok", "ok"]


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
    form = baselines.form("pack", "reference")
    rows = list(timing._time_on_cuda(row, form, case, registry.inputs(case, "cpu"), None, plan))
    assert [(r.call, r.status) for r in rows[:2]] == [("eager", "ok")] * 2
    assert (rows[2].call, rows[2].status) == ("replay", "not capturable: reads sizes back to the host")


def test_a_row_of_a_known_gpu_stands_beside_its_prediction():
    case = Case("group_norm_silu", "fwd", "paper", "bf16")
    shape = registry.inputs(case, "meta").shape
    for device, known in (("NVIDIA H200", True), ("NVIDIA GeForce RTX 4090", True), ("Some GPU", False)):
        for backend in ("ours", "eager"):
            row = OpRow(case.op, case.mode, case.size, str(shape), case.dtype, backend, "replay", "warm", device=device)
            row = timing._timed(
                row, measure.Times(1.0, 2.0, 3.0), case, SimpleNamespace(shape=shape), torch.device("cpu")
            )
            assert (row.least_ms is not None, row.model_ms is not None) == (known, known and backend == "ours")
            assert ("PREDICTION" in row.line()) == known
            if row.model_ms is not None:
                assert row.model_ms > row.least_ms


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
        monkeypatch.setitem(baselines.FORMS, (op, "ours"), broken)
    words = f"--device cpu --quick --verify-only --size tiny --mode fwd --backend ours reference --op {op} --out"
    assert run.main([*words.split(), str(tmp_path)]) == code
    with (tmp_path / "verify.csv").open(newline="") as file:
        rows = {row["backend"]: row["status"] for row in csv.DictReader(file)}
    assert rows == {"ours": status, "reference": "verified"}


def test_rows_of_a_cpu_are_calls_with_counted_launches_and_of_forms_that_run():
    rows = list(timing.measure_case(small_case("masked_pool", "bwd"), on_cpu(backends=("ours", "eager", "compile"))))
    assert [(row.backend, row.call, row.l2, row.status) for row in rows] == [
        ("eager", "eager", "warm", "ok"),
        ("compile", "eager", "warm", "skipped: the time for compilation is spent"),
    ]
    assert rows[0].launches > 0 and rows[0].ms_p50 > 0 and rows[0].error < 1e-5


def test_a_case_beyond_the_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 10)
    (row,) = timing.measure_case(small_case("masked_pool"), on_cpu())
    assert row.backend == "all" and row.status.startswith("skipped: moves 0 GB")


def test_predictions_are_bytes_over_the_rates_of_data_sheets(capsys):
    """geglu reads two of every element that it writes: 2 images, 64 x 64 pixels, 1280 columns, 2 bytes."""
    timing.print_predictions([Case("geglu", "fwd", "512px", "bf16")])
    *_, line = capsys.readouterr().out.splitlines()
    moved = 3 * 2 * 64 * 64 * 1280 * 2
    words = line.split()
    assert words[:4] == ["geglu", "fwd", "512px", "bf16"] and float(words[4]) == pytest.approx(moved / 1e6, abs=1e-3)
    least = [1e6 * moved / rate for rate in (1008e9, 4.8e12)]
    assert [float(words[k]) for k in (5, 7)] == [pytest.approx(us, abs=0.01) for us in least]
    assert float(words[6]) >= least[0] - 0.01 and float(words[8]) >= least[1] - 0.01
