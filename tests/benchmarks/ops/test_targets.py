"""Targets of the kernels: one for every kernel that is shipped, judged by rows of a GPU alone."""

from __future__ import annotations

import torch

from benchmarks.aot.cases import shipped_kernels
from benchmarks.counts import kernels as counts
from benchmarks.harness.output import OpRow, columns
from benchmarks.ops import baselines, cases, optimisers, registry, targets
from benchmarks.ops.cases import Case


def _row(**changes: str) -> dict[str, str]:
    row = dict.fromkeys(columns(OpRow), "")
    return row | {"device": "Some GPU", "call": "replay", "l2": "warm", "status": "ok"} | changes


def _launched_by_the_registry() -> set[str]:
    """Names of the kernels that the registry's ops and optimisers launch, on large and small shapes."""
    seen: set[str] = set()
    for op in cases.OPS:
        run = baselines.form(op, "ours")
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
        forms = baselines.FORMS
        if op in cases.OPS:
            assert all((op, "eager" if rival == "compile" else rival) in forms for rival in wanted.rivals), op


def test_a_kernel_without_an_entry_fails(monkeypatch):
    monkeypatch.setattr(cases, "OPS", tuple(op for op in cases.OPS if op != "hash_draw"))
    assert shipped_kernels() - _launched_by_the_registry() == {"hash_draw_kernel"}


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
