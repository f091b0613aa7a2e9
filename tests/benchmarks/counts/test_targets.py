"""The table of targets: what the model predicts, what was measured and how, and a verdict that follows from them."""

from __future__ import annotations

import json

import pytest

from benchmarks import targets as command
from benchmarks.counts import model, targets
from benchmarks.counts.roofline import CHIPS
from benchmarks.counts.targets import Measurement, Prediction, Target

ROOM = Prediction(20.0, {"bytes": 15.0, "gaps": 5.0})


@pytest.mark.parametrize(
    ("bound", "at_least", "predicted", "measured", "verdict"),
    [
        (27, False, ROOM, None, "predicted: met"),
        (17, False, ROOM, None, "predicted: missed; in the way: bytes"),
        (21, True, ROOM, None, "predicted: missed; in the way: bytes"),
        (27, False, ROOM, Measurement(30, "GPU"), "missed"),
        (27, False, Prediction(30.0), Measurement(20, "stand-in"), "met"),
        (27, False, ROOM, Measurement(900, "CPU"), "predicted: met"),
        (1.5, False, None, None, "not judged: no prediction, no row"),
        (900, False, None, Measurement(1027, "count"), "missed"),
    ],
)
def test_a_measurement_decides_else_the_model(bound, at_least, predicted, measured, verdict):
    assert Target("a step", "H200", bound, "ms", at_least).verdict(predicted, measured) == verdict


def test_every_target_has_a_row(capsys):
    rows = targets.table([])
    assert len(rows) == len({(what, chip) for what, chip, *_ in rows}) > 20
    by_chip = {(what, chip): cells for what, chip, *cells in rows}
    for chip in CHIPS:
        _, predicted, measured, verdict = by_chip["fine-tuning step, 256x256 batch 2", chip.name]
        assert float(predicted) > 0 and measured == "" and verdict.startswith("predicted: ")
    assert "stand-in" in by_chip["peak memory, 512x512 batch 2, lean", "any"][2]
    command.main([])
    shown = capsys.readouterr().out
    assert all(row[0] in shown for row in rows)


def test_steps_that_were_not_counted_have_no_prediction(monkeypatch, tmp_path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({}))
    monkeypatch.setattr(model, "STEPS", path)
    model.steps.cache_clear()
    try:
        rows = {(what, chip): cells for what, chip, *cells in targets.table([])}
    finally:
        model.steps.cache_clear()
    assert rows["fine-tuning step, 256x256 batch 2", "H200"][-1] == "not judged: no prediction, no row"


def test_rows_of_a_gpu_are_judged_in_the_unit_of_their_target():
    """Images a second of a batch of 16, steps a second of a picture of 100, per cent of a copy."""
    gpu = {"device": "NVIDIA H200", "backend": "captured"}
    batch = {"op": "train_step", "size": "512x512 b16", "ms_p50": "80", **gpu}
    picture = {"op": "infer", "size": "512x512 b1", "shape": "100 DDIM steps, guidance 7.5", "ms_p50": "1000", **gpu}
    share = {"op": "scatter_mean", "mode": "fwd", "dtype": "bf16", "size": "1e6", "call": "replay", "l2": "flushed"}
    share |= {"ms_p50": "1", "copy_share": "0.9", **gpu, "backend": "ours"}
    found = {(what, chip): cells for what, chip, *cells in targets.table([batch, picture, share])}
    expected = {
        "fine-tuning, 512x512 batch 16": ("200 (GPU)", "met"),
        "sampling, 512x512, guided": ("100 (GPU)", "missed"),
        "scatter_mean fwd, 1e6 relations, of a copy": ("90 (GPU)", "met"),
    }
    for what, cells in expected.items():
        assert tuple(found[what, "H200"][2:]) == cells
        assert (what, "RTX 4090") not in found or found[what, "RTX 4090"][2] == ""
