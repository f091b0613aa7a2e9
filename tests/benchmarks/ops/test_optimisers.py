"""Optimisers that are timed step as Adam does; one that does not gets no number."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import optimiser
from benchmarks.harness.output import OpRow, columns, read_rows
from benchmarks.ops import optimisers
from sgg_fast import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _auto_kernels():
    yield
    ops.use_kernels("auto")


def test_optimiser_rows_are_of_forms_that_step_as_adam_does(tmp_path, monkeypatch):
    backends = ["reference", "fused", "bitsandbytes-flat", "torchao"]
    words = ["--size", "tiny", "--seconds", "0", "--backend", *backends, "--out", str(tmp_path)]
    assert optimiser.main(words) == 0
    rows = read_rows(tmp_path / "bench.csv")
    assert list(rows[0]) == columns(OpRow)
    named = {(row["op"], row["dtype"], row["backend"]) for row in rows if row["status"] == "ok"}
    assert {name for *_, name in named} >= {"reference", "fused"} and ("adam8bit", "split", "reference") in named
    assert all(float(row["ms_p50"]) > 0 for row in rows if row["status"] == "ok")

    def too_far(op, weights, parameters):
        return torch.optim.Adam(parameters, 1.1 * optimisers.LR)

    monkeypatch.setitem(optimisers.FORMS, "fused", too_far)
    (row,) = optimisers.rows("adam", "fp32", "tiny", "fused", torch.device("cpu"), 0.0)
    assert row.status.startswith("mismatch: relative error 1.00e-01") and row.ms_p50 is None


def test_transformers_adafactor_steps_as_ours_on_matrices():
    """With convolutions as they are it would factor each 3 x 3 kernel, which is another update."""
    reason, error = optimisers.judged("transformers", "adafactor", "fp32", CPU)
    assert not reason and error < 1e-3
    assert optimisers.judged("transformers", "adam", "fp32", CPU) is None, "there is no such form"


def test_fewer_bits_of_state_are_farther_from_adam():
    errors = [optimisers.update_error("reference", op, "fp32", CPU) for op in ("adam", "adam8bit", "adam4bit")]
    assert errors == sorted(errors) and errors[0] < 1e-5 < errors[1] < errors[2] < 0.5


def test_what_is_not_installed_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (row,) = optimisers.rows("adam4bit", "bf16", "tiny", "torchao", CPU, 0.0)
    assert (row.status, row.ms_p50) == ("not installed (pip install torchao)", None)


def test_the_weights_of_a_size():
    unet = optimisers.shapes("unet")
    assert len(unet) == 686 and sum(torch.Size(shape).numel() for shape in unet) == 859_520_964
    several, whole = (optimisers.parameters([(3, 4), (5,)], torch.bfloat16, CPU, flat) for flat in (False, True))
    assert [tuple(p.shape) for p in several] == [(3, 4), (5,)] and [tuple(p.shape) for p in whole] == [(17,)]
    for parameter in (*several, *whole):
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16 and parameter.grad.abs().max() > 0
