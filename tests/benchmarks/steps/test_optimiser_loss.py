"""Fine-tunings side by side: one start, the same samples, then each its own way."""

from __future__ import annotations

import argparse

import pytest
from support.tiny_runs import TINY

from benchmarks.steps import optimiser_loss as measured


def test_all_begin_with_one_loss_and_part_after_their_first_updates(monkeypatch):
    known, small = measured.recipe, {name: TINY[name] for name in ("width", "num_layers")}
    monkeypatch.setattr(measured, "recipe", lambda name, **settings: known(name, **small, resolution=32, **settings))
    args = argparse.Namespace(optimizer=["adam", "adam8bit"], weights="master", batch_size=2, steps=3)
    found = list(measured.runs_of(1, args))
    assert [list(losses) for losses in found] == [["adam", "adam8bit"]] * 3
    assert found[0]["adam"] == pytest.approx(found[0]["adam8bit"], rel=1e-6)
    assert found[2]["adam"] != found[2]["adam8bit"]
    assert found[2]["adam"] == pytest.approx(found[2]["adam8bit"], rel=0.2)
    assert found[0] != found[1], "each step has other samples"
