"""Fine-tuning in `benchmarks.train_step`: every form runs, is compared before it is timed, and says what it lacks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT

from benchmarks import train_step
from benchmarks.harness import measure
from benchmarks.harness.output import columns
from benchmarks.steps import finetune, train_forms
from benchmarks.steps.forms import Size
from sgg_fast.train.optim.groups import MIN_8BIT_ELEMENTS

CPU = torch.device("cpu")
SIZES = [Size(32, 2), Size(64, 2)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the command itself writes at toy sizes, as `make gpu-suite-dry` runs it."""
    path = tmp_path_factory.mktemp("step") / "train_step.csv"
    words = ["--stage", "finetune", "--quick", "--form", "plain", "lean-in-backward", "diffusers-8bit-xformers"]
    command = [sys.executable, "-m", "benchmarks.train_step", *words, "--out", str(path.parent)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def test_every_form_is_timed_and_named_as_toy(rows):
    printed, found = rows
    assert "TOY SIZES" in printed and "say nothing about Stable Diffusion" in printed
    assert [row["backend"] for row in found] == ["plain", "lean-in-backward", "diffusers-8bit-xformers"]
    assert list(found[0]) == columns(finetune.StepRow)
    for row in found:
        assert (row["op"], row["mode"], row["size"], row["status"]) == ("train_step", "finetune", "32x32 b2", "ok")
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["ms_p50"]), rel=1e-4)
        assert row["peak_bytes"] == row["floor_ms"] == row["over_floor"] == ""  # they are a GPU's
        assert row["device"].startswith("CPU") and row["commit"] and row["date"]
        assert (row["planned_bytes"] != "") == (not row["backend"].startswith("diffusers"))


def test_bytes_of_the_update_are_counted(rows):
    """Weight, gradient and two bytes of state read, weight and state written: 16 bytes in fp32, 10 in bf16."""
    by_form = {row["backend"]: int(row["compulsory_bytes"]) for row in rows[1]}
    assert by_form["plain"] / by_form["lean-in-backward"] == 16 / 10
    assert by_form["diffusers-8bit-xformers"] < by_form["plain"]  # no graph modules
    assert by_form["plain"] > 16 * 500 * MIN_8BIT_ELEMENTS


def test_floor_is_operations_then_bytes():
    row = finetune.StepRow("train_step", "finetune", "", "", "bf16", "plain", "eager", "warm")
    row.flops, row.compulsory_bytes = int(1.06e12), int(13.75e9)
    fake = measure.Machine("NVIDIA GeForce RTX 4090", "", "", "", "", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "machine", lambda device: fake)
        assert finetune._floor(row, CPU) == pytest.approx(1.06e12 / 165e9 + 13.75e9 / 1008e6)
    assert finetune._floor(row, CPU) is None  # a CPU has no data sheet here


def test_operations_are_counted_per_image():
    """A UNet's are near those of its convolutions alone from below, and grow with the picture's area."""
    model = train_forms.settings(quick=True).model
    small, large = (finetune.step_flops(model, resolution) for resolution in (64, 128))
    assert 3.5 < large / small < 6.0  # attention grows faster


@pytest.fixture(scope="module")
def form():
    return train_forms.build("lean", train_forms.settings(quick=True), SIZES, CPU, finetune.NUM_LOSSES)


def test_a_wrong_form_is_not_timed(form, monkeypatch):
    """At each size: what is right at the first may be wrong at the next."""
    for size in SIZES:
        form.prepare(size)
        assert finetune.mismatch(form, size) == ""
        form.step()
    monkeypatch.setattr(train_forms, "build", lambda *_: form)
    losses = type(form).losses

    def off(self, num):
        second = self.stage.cache.latent_shape != small
        return [loss + 0.5 * second for loss in losses(self, num)]

    form.prepare(SIZES[0])
    small = form.stage.cache.latent_shape
    monkeypatch.setattr(type(form), "losses", off)
    first, second = finetune.measure_form("lean", form.config, SIZES, CPU, 0.1)
    assert first.status == "ok" and first.ms_p50
    assert second.status.startswith("mismatch: losses off by") and second.ms_p50 is None


def test_what_needs_a_gpu_says_so_here():
    config = train_forms.settings(quick=True)
    (row,) = finetune.measure_form("captured", config, [Size(32, 2)], CPU, 0.1)
    assert (row.status, row.call, row.ms_p50) == ("skipped: CUDA graphs need a GPU", "replay", None)


def test_out_of_memory_ends_the_larger_sizes(form, monkeypatch):
    monkeypatch.setattr(train_forms, "build", lambda *_: form)
    monkeypatch.setattr(finetune, "mismatch", lambda *_: "")

    def refuse():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(form, "step", refuse)
    first, second = finetune.measure_form("lean", form.config, SIZES, CPU, 0.1)
    assert first.status == "ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert first.planned_bytes > 0 and first.ms_p50 is None
    assert second.status == "skipped: a smaller one ran out of memory"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "the true sizes need a GPU; --quick runs the toy's here"),
        (["--device", "cpu", "--quick", "--memory-cap", "24GiB"], "--memory-cap limits a GPU's memory"),
    ],
)
def test_refusals(capsys, words, said):
    assert train_step.main(["--stage", "finetune", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_row_is_shown_with_its_peak_its_plan_and_its_floor():
    row = finetune.StepRow("train_step", "finetune", "32x32 b2", "", "bf16", "plain", "eager", "warm")
    row.set_times(measure.Times(1.0, 20.0, 30.0))
    row.images_per_s, row.peak_bytes, row.planned_bytes, row.over_floor = 100.0, 3 * 2**29, 2**31, 2.5
    assert row.line().split() == ["32x32", "b2", "plain", "20.00", "ms", "100.00", "images/s", "peak", "1.50", "GiB",
                                  "planned", "2.00", "2.5", "x", "floor"]  # fmt: skip
    assert finetune.StepRow(*["x"] * 8, status="failed: no").line().endswith("failed: no")
