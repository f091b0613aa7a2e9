"""The benchmarks measure the right thing: sound inputs, wrong results refused, honest rows, counts that match."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sgg_kernels import reference
from sgg_kernels.reference.pack import STORE_FIELDS
from support import ROOT, pinned

from benchmarks import gpu_suite, optimiser, run
from benchmarks.aot.cases import shipped_kernels
from benchmarks.counts import kernels as counts
from benchmarks.counts import roofline
from benchmarks.counts import unet as unet_counts
from benchmarks.harness import measure, verify
from benchmarks.harness.output import OpRow, columns
from benchmarks.ops import baselines as baselines_torch
from benchmarks.ops import cases, optimisers, registry, targets, timing
from benchmarks.ops.cases import Case

FLOAT_OPS = [op for op in cases.OPS if op != "pack"]


def _case(op: str, mode: str = "fwd_bwd", size: str = "vg2", dtype: str = "fp32") -> Case:
    size = size if op in cases.GRAPH_OPS else "tiny"
    if op in cases.FORWARD_ONLY:
        mode, dtype = "fwd", cases.FORWARD_ONLY[op]
    return Case(op, mode, size, dtype, width=16)


def _plan(**changes: object) -> timing.BenchSettings:
    settings = {"device": torch.device("cpu"), "backends": ("eager",), "seconds": 0.0, "compile_seconds": 0.0}
    return timing.BenchSettings(**{**settings, **changes})


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("op", FLOAT_OPS)
def test_every_baseline_agrees_with_the_reference(op, mode):
    case = _case(op, mode)
    if case.mode != mode:
        pytest.skip("no gradient")
    given = registry.inputs(case, "cpu")
    judge = verify.Judge(case, given)
    for backend in ("reference", "eager", "sg2im", "pyg"):
        if backend == "pyg" and importlib.util.find_spec("torch_geometric") is None:
            continue
        form = baselines_torch.form(op, backend)
        if form is not None:
            verdict = judge.verdict(verify.run(form, given, given.tensors, mode), backend)
            assert not verdict.reason, (backend, verdict)


def test_few_columns_stand_for_all(monkeypatch):
    monkeypatch.setattr(verify, "MANY_ELEMENTS", 0)
    monkeypatch.setattr(verify, "FEW_COLUMNS", 4)
    for op in FLOAT_OPS:
        case = _case(op)
        given = registry.inputs(case, "cpu")
        judge, form = verify.Judge(case, given), baselines_torch.form(op, "eager")
        assert (judge.columns is None) == (op in verify.MIXES_COLUMNS)
        results = verify.run(form, given, given.tensors, case.mode)
        assert not judge.verdict(results, "eager").reason
        results[0][0, 0 if judge.columns is None else judge.columns[0]] += 1
        assert judge.verdict(results, "eager").reason


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
    case = _case("scatter_mean")
    given = registry.inputs(case, "cpu")
    form = _spoil(baselines_torch.form("scatter_mean", "eager"), how)
    judge = verify.Judge(case, given)
    (row,) = timing.measure_form(case, given, judge, "eager", form, _plan())
    assert row.status.startswith("mismatch: ")
    assert row.ms_p20 is row.ms_p50 is row.ms_p80 is row.gb_s is row.copy_share is None


def test_a_wrong_integer_is_refused():
    case = _case("pack")
    given = registry.inputs(case, "cpu")
    judge, form = verify.Judge(case, given), baselines_torch.form("pack", "reference")
    results = verify.run(form, given, given.tensors, "fwd")
    assert not judge.verdict(results, "reference").reason
    results[2][0] += 1
    assert judge.verdict(results, "reference").reason == "tensors [2] differ"


def test_one_failing_form_does_not_lose_the_rest():
    def broken(given, tensors):
        raise RuntimeError("out of luck\nand more")

    case = _case("masked_pool")
    given = registry.inputs(case, "cpu")
    (row,) = timing.measure_form(case, given, verify.Judge(case, given), "ours", broken, _plan())
    assert row.status == "failed: RuntimeError: out of luck" and row.ms_p50 is None


def test_csv_has_every_column_and_never_times_the_interpreter(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ["--quick", "--size", "tiny", "--width", "16", "--device", "cpu", "--compile-seconds", "0"]
    assert run.main([*words, "--out", str(tmp_path)]) == 0
    rows = _read(tmp_path / "bench.csv")
    assert list(rows[0]) == columns(OpRow)
    assert {row["op"] for row in rows} == set(cases.OPS)
    assert {row["backend"] for row in rows} == {"reference", "eager", "compile", "pyg", "sg2im"}
    for row in rows:
        facts = ("shape", "dtype", "device", "cpu", "torch", "triton", "commit", "date", "status")
        assert all(row[name] for name in facts)
        assert row["device"].startswith("CPU")
        if row["status"] == "ok":
            assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
            assert float(row["copy_share"]) == pytest.approx(float(row["gb_s"]) / float(row["copy_gb_s"]), rel=1e-4)
            assert int(row["launches"]) > 0
        else:
            assert not row["ms_p50"]
    printed = capsys.readouterr().out
    assert "CPU rows" in printed and "PREDICTION" in printed and "not a measurement" in printed


class _Event:
    """A stand-in for a CUDA event, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stand_in_cuda(monkeypatch):
    """Just enough of torch.cuda on the host to run the logic of the CUDA path; its times mean nothing."""
    stand_ins = {
        "Event": _Event,
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 160,
        "get_device_name": lambda device: "stand-in",
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure, "_flush_buffer", lambda device: torch.zeros(8))
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "launches", lambda run, device: 7)
    measure.machine.cache_clear()
    yield
    measure.machine.cache_clear()


@pytest.mark.parametrize("mode", cases.MODES)
def test_cuda_rows_are_calls_and_replays_warm_and_flushed(stand_in_cuda, mode):
    case, plan = _case("scatter_mean", mode), _plan(device=torch.device("cuda", 0))
    given = registry.inputs(case, "cpu")
    judge, form = verify.Judge(case, given), baselines_torch.form("scatter_mean", "eager")
    rows = list(timing.measure_form(case, given, judge, "eager", form, plan))
    kinds = [(row.call, row.l2) for row in rows]
    assert kinds == [("eager", "warm"), ("eager", "flushed"), ("replay", "warm"), ("replay", "flushed")]
    for row in rows:
        assert (row.status, row.device, row.launches, row.peak_bytes) == ("ok", "stand-in", 7, 60)
        assert row.ms_p20 <= row.ms_p50 <= row.ms_p80


def test_what_cannot_be_captured_or_replays_wrongly_says_so(stand_in_cuda, monkeypatch):
    case, plan = _case("masked_pool", "fwd"), _plan(device=torch.device("cuda", 0))
    given = registry.inputs(case, "cpu")
    judge, form = verify.Judge(case, given), baselines_torch.form("masked_pool", "eager")
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


def _index_bytes(given: registry.Inputs, op: str) -> int:
    if op in cases.IMAGE_OPS:
        return 0
    batch = given.batch
    named = {
        "gather_add_relu": (batch.subject, batch.object),
        "scatter_mean": batch.plan,
        "masked_pool": (batch.object_ptr, batch.relation_ptr, batch.object_pooled, batch.relation_pooled),
        "graph_mean": (batch.relation_ptr,),
        "triple_context": (batch.subject, batch.object, batch.relation_graph),
        "layer": batch.plan,
    }[op]
    return sum(t.nbytes for t in named)


@pytest.mark.parametrize("op", FLOAT_OPS)
def test_compulsory_bytes_are_the_bytes_of_the_tensors(op):
    given = registry.inputs(_case(op, size="paper"), "cpu")
    outputs = baselines_torch.form(op, "reference")(given, given.tensors)
    moved = sum(t.nbytes for t in (*given.tensors.values(), *outputs)) + _index_bytes(given, op)
    if op == "masked_pool":  # what the masks leave out is not read
        out = (given.shape.objects + given.shape.relations) - (
            given.shape.pooled_objects + given.shape.pooled_relations
        )
        moved -= out * 16 * 4
    assert roofline.compulsory(op, "fwd", given.shape, 4).bytes == moved
    if op in cases.FORWARD_ONLY:
        return
    both = roofline.compulsory(op, "fwd_bwd", given.shape, 4)
    assert both == roofline.compulsory(op, "fwd", given.shape, 4) + roofline.compulsory(op, "bwd", given.shape, 4)


def test_counter_sees_operators_and_bytes():
    def form(given, tensors):
        return (tensors["rows"].t().contiguous()[given.index["relation_graph"][:3]].relu(),)

    given = registry.inputs(_case("graph_mean"), "cpu")
    rows, (counter,) = given.tensors["rows"], counts.observe(form, given, backward=False)
    assert dict(counter.names) == {"clone": 1, "index": 1, "relu": 1}
    taken = 3 * rows.shape[0] * 4
    assert counter.count() == counts.Count(3, 2 * rows.nbytes + (2 * taken + 3 * 8) + 2 * taken)


@pinned
def test_kernels_readme_holds_the_counted_table():
    assert counts.TABLE.committed() == counts.TABLE.section(), "run: python -m benchmarks.counts --write"


@pytest.mark.slow
def test_kernels_readme_holds_the_unets_table():
    assert unet_counts.TABLE.committed() == unet_counts.TABLE.section(), "run: python -m benchmarks.counts.unet --write"


def test_optimiser_rows_are_of_forms_that_step_as_adam_does(tmp_path, monkeypatch):
    backends = ["reference", "fused", "bitsandbytes-flat", "torchao"]
    words = ["--size", "tiny", "--seconds", "0", "--backend", *backends, "--out", str(tmp_path)]
    assert optimiser.main(words) == 0
    rows = _read(tmp_path / "bench.csv")
    assert list(rows[0]) == columns(OpRow)
    named = {(row["op"], row["dtype"], row["backend"]) for row in rows if row["status"] == "ok"}
    assert {name for *_, name in named} >= {"reference", "fused"} and ("adam8bit", "split", "reference") in named
    assert all(float(row["ms_p50"]) > 0 for row in rows if row["status"] == "ok")

    def too_far(op, weights, parameters):
        return torch.optim.Adam(parameters, 1.1 * optimisers.LR)

    monkeypatch.setitem(optimisers.FORMS, "fused", too_far)
    (row,) = optimisers.rows("adam", "fp32", "tiny", "fused", torch.device("cpu"), 0.0)
    assert row.status.startswith("mismatch: relative error 1.00e-01") and row.ms_p50 is None


def _row(**changes: str) -> dict[str, str]:
    row = dict.fromkeys(columns(OpRow), "")
    return row | {"device": "Some GPU", "call": "replay", "l2": "warm", "status": "ok"} | changes


def _launched_by_the_registry() -> set[str]:
    """Names of the kernels that the registry's ops and optimisers launch, on large and small shapes."""
    seen: set[str] = set()
    for op in cases.OPS:
        run = baselines_torch.form(op, "ours")
        for size in ("paper", "1e4" if op in cases.GRAPH_OPS else "512px"):
            given = registry.inputs(Case(op, "fwd_bwd", size, cases.FORWARD_ONLY.get(op, "bf16")), "cpu", drawn=False)
            leaves = {name: t.detach().requires_grad_() for name, t in given.tensors.items()}
            with counts.counted_launches() as names:
                outputs = run(given, leaves)
                if leaves and op != "layer":  # its GEMMs would run
                    torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs])
            seen |= set(names)
    for op, forms in optimisers.BYTES.items():
        for weights in forms:
            seen |= set(counts.launched_by_optimiser(op, weights))
    return seen


def test_every_kernel_has_an_entry_in_the_registry_and_every_entry_a_target():
    assert set(targets.TARGETS) == set(cases.OPS) | set(optimisers.BYTES)
    missing = shipped_kernels() - _launched_by_the_registry()
    assert not missing, f"no op of benchmarks/ops launches {sorted(missing)}"
    for op, wanted in targets.TARGETS.items():
        assert wanted.shares or wanted.rivals, op
        known = set(cases.OPTIMISERS) if op in optimisers.BYTES else set(cases.BACKENDS)
        assert set(wanted.rivals) <= known - {"ours"}, op
        forms = baselines_torch.FORMS
        if op in cases.OPS:
            assert all((op, "eager" if rival == "compile" else rival) in forms for rival in wanted.rivals), op


def test_a_kernel_without_an_entry_fails(monkeypatch):
    monkeypatch.setattr(cases, "OPS", tuple(op for op in cases.OPS if op != "hash_draw"))
    assert shipped_kernels() - _launched_by_the_registry() == {"hash_draw_kernel"}


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


def test_targets_are_read_from_gpu_rows_only():
    paper = {"op": "scatter_mean", "mode": "fwd_bwd", "dtype": "bf16", "size": "paper"}
    large = {"op": "scatter_mean", "mode": "fwd", "dtype": "bf16", "backend": "ours", "l2": "flushed", "ms_p50": "1"}
    rows = [
        _row(**paper, backend="ours", ms_p50="0.02"),
        _row(**paper, backend="pyg", ms_p50="0.03"),
        _row(**paper, backend="compile", ms_p50="0.01"),
        _row(**large, size="1e5", copy_share="0.9"),
        _row(**large, size="1e6", copy_share="0.8"),
    ]
    found = {finding.target: finding for finding in targets.findings(rows) if finding.verdict != "no row"}
    assert [(f.found, f.verdict) for f in found.values()] == [
        ("80.0 % at 1e6", "missed"),
        ("20.00 us, compile 0.50x", "missed"),
    ]
    on_cpu = [row | {"device": "CPU, 2 threads"} for row in rows]
    assert {finding.verdict for finding in targets.findings(on_cpu)} == {"no row"}


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
    verified = _read(tmp_path / "verify.csv")
    assert {row["op"] for row in verified} == set(cases.OPS)
    assert {(row["backend"], row["status"], row["ms_p50"]) for row in verified} == {("ours", "verified", "")}
    assert not any(row["backend"] == "ours" for row in _read(tmp_path / "bench.csv"))


@pytest.mark.parametrize("size", ["paper", "vg64"])
def test_the_bytes_of_pack_are_those_of_its_fields(size):
    given = registry.inputs(_case("pack", size=size), "cpu")
    draw = given.draw
    out, masked = reference.pack(draw.store, draw.ids, draw.object_ptr, draw.relation_ptr, draw.mask)
    written = sum(t.nbytes for t in (*out.values(), masked))
    read = sum(t.nbytes for name, t in out.items() if name in STORE_FIELDS)
    graphs = 6 * 4 * (given.shape.graphs + 1)  # each one's place in the store and in the batch
    last = 2 * 4  # message_ptr has an element more than there are objects
    assert roofline.compulsory("pack", "fwd", given.shape, 4).bytes == written + read - last + graphs
