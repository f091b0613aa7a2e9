"""The benchmark of a pre-training step, tiny: its forms agree, its counts are of what ran, its files say so."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import train_step
from benchmarks.steps import pretrain as pretrain_step
from sgg_fast import ops


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(pretrain_step, "NUM_PAIRS", 8)
    yield
    ops.use_kernels("auto")


def test_rows_of_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ["--stage", "pretrain", "--quick", "--device", "cpu", "--batch", "2", "--out", str(tmp_path)]
    assert train_step.main(words) == 0
    with (tmp_path / "pretrain_step.csv").open() as file:
        naive, cached, kernels, graphs = csv.DictReader(file)
    assert naive["parameters"] == cached["parameters"] == kernels["parameters"]
    for row in (naive, cached):
        assert row["status"] == "ok" and row["triton_launches"] == "0"
        assert float(row["ms_p50"]) > 0 and float(row["triples_per_s"]) > 3 * float(row["images_per_s"])
        assert float(row["over_floor"]) == pytest.approx(float(row["ms_p50"]) / float(row["floor_ms"]), rel=1e-3)
    # Towers and the optimiser by parameter are gone.
    assert int(cached["library_launches"]) < 0.6 * int(naive["library_launches"])
    assert kernels["status"] == "counted, not run" and not kernels["ms_p50"]
    # pack, forward and backward of each layer and of what follows it, and three of the optimiser
    assert 20 < int(kernels["triton_launches"]) < 100
    assert int(kernels["library_launches"]) < int(cached["library_launches"])
    assert graphs["status"] == "skipped: needs CUDA" and not graphs["library_launches"]
    assert "toy sizes" in capsys.readouterr().out


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch):
    setup = pretrain_step.Setup(True, torch.device("cpu"))
    first = pretrain_step.Trained.first
    monkeypatch.setattr(pretrain_step.Trained, "first", lambda self, num: 1.01 * first(self, num))
    naive, cached = pretrain_step.rows(setup, ["naive", "cached"], [2], 0.01, False)
    assert naive.status == "ok" and naive.ms_p50
    assert cached.status.startswith("mismatch") and cached.ms_p50 is None and cached.library_launches is None


def test_random_pairs_have_visual_genomes_sizes():
    source = pretrain_step.random_pairs(40, 16)
    assert source.load_image(3).shape == (16, 16, 3) and len(source) == 40
    assert all(3 <= len(g.objects) <= 30 and 1 <= len(g.relations) <= 30 for g in source.graphs)
