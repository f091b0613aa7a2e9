"""The table of targets: what the model predicts, what was measured and how, and a verdict that follows from them."""

from __future__ import annotations

import contextlib
import json

import pytest

from benchmarks import gemm_precision, optimiser_loss
from benchmarks import targets as command
from benchmarks.counts import model, targets
from benchmarks.counts.model import StepCounts, Work, step_terms
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


def test_the_terms_of_a_step_are_its_work_on_the_chip():
    counts = StepCounts(Work(1000, 10**9, 10**12), Work(10, 10**10))
    terms = step_terms(counts, CHIPS[0])
    assert terms["bytes of the optimiser"] == pytest.approx(10**10 / 1008e9)
    assert terms["convolutions and GEMMs"] == pytest.approx(10**12 / 165e12 / 0.55)
    assert terms["gaps between kernels"] == pytest.approx(1010 * model.GAP)


def test_more_pixels_cost_activations_and_no_weights():
    small, large = (StepCounts(Work(9, 100 + 10 * n, 40 * n), Work(5, 7)) for n in (1, 4))
    scaled = StepCounts.scaled(small, large, pixels=32)
    assert scaled == StepCounts(Work(9, 100 + 320, 40 * 32), Work(5, 7))


def test_the_committed_counts_are_those_that_are_written():
    from benchmarks.counts import step

    assert model.steps().keys() == step.written().keys()
    finetune = model.steps()["finetune 256 b2"]
    assert finetune.compute.flops > 1e12 and finetune.update.bytes > 10e9


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


def test_a_row_of_a_gpu_is_judged_on_its_chip_alone(tmp_path, capsys):
    path = tmp_path / "train_step.csv"
    path.write_text("op,backend,size,ms_p50,device\ntrain_step,captured,256x256 b2,26.5,NVIDIA GeForce RTX 4090\n")
    command.main([str(path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "step, 256x256 batch 2" in line]
    assert "26.5 (GPU)" in lines[0] and lines[0].rstrip(" |").endswith("| met")
    assert "GPU)" not in lines[1]


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


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (command.main, ["nowhere.csv"], "nowhere.csv: there is no such file"),
        (gemm_precision.main, ["--steps", "0"], "--steps must be at least 1, not 0"),
        (optimiser_loss.main, ["--steps", "0"], "--steps must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(main, words, said, capsys):
    with contextlib.suppress(SystemExit):
        assert main(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
