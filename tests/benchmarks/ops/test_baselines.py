"""The forms of every op compute the same."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from support.cases.benchmark import FLOAT_OPS, small_case

from benchmarks.harness import verify
from benchmarks.harness.output import UnavailableError
from benchmarks.ops import baselines, cases, registry


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("op", FLOAT_OPS)
def test_every_baseline_agrees_with_the_reference(op, mode):
    case = small_case(op, mode)
    if case.mode != mode:
        pytest.skip("no gradient")
    given = registry.inputs(case, "cpu")
    judge = verify.Judge(case, given)
    for backend in ("reference", "eager", "sg2im", "pyg"):
        if backend == "pyg" and importlib.util.find_spec("torch_geometric") is None:
            continue
        form = baselines.form(op, backend)
        if form is not None:
            verdict = judge.verdict(verify.run(form, given, given.tensors, mode), backend)
            assert not verdict.reason, (backend, verdict)


@pytest.mark.parametrize("op", cases.OPS)
def test_our_forms_agree_with_the_reference(op):
    """Compiled where there is a GPU, else through Triton's interpreter."""
    case = dataclasses.replace(small_case(op, "fwd"), size="tiny")
    given = registry.inputs(case, "cuda" if torch.cuda.is_available() else "cpu")
    judge = verify.Judge(case, given)
    for backend in ("ours", "reference"):
        results = verify.run(baselines.form(op, backend), given, given.tensors, "fwd")
        assert not judge.verdict(results, backend).reason, backend


def test_a_form_is_absent_or_unavailable_or_puts_the_choice_of_kernels_back(monkeypatch):
    assert baselines.form("geglu", "pyg") is None is baselines.form("pack", "compile")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install torch_geometric"):
        baselines.form("scatter_mean", "pyg")
    given = registry.inputs(small_case("geglu"), "meta")
    chosen = []
    monkeypatch.setattr(baselines.ops, "use_kernels", chosen.append)
    baselines.form("geglu", "reference")(given, given.tensors)
    assert chosen == ["reference", "auto"]
