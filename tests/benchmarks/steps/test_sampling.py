"""`benchmarks.infer`: forms that draw the same, numbers only for those, counts that add up; the toy model on a CPU."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import infer
from benchmarks.harness.output import columns
from benchmarks.steps import infer_forms, sampling
from benchmarks.steps.forms import Size
from sgg_fast.pipeline import SceneGraphToImagePipeline

ONE = Size(64, 1)


@pytest.fixture(scope="module")
def pipeline() -> SceneGraphToImagePipeline:
    return infer_forms.open_models("toy", torch.device("cpu"), torch.float32)


def layers(pipeline: SceneGraphToImagePipeline) -> int:
    """Layers of the UNet with weights: each runs an operator at least."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in pipeline.unet.modules())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_all_forms_that_run_here(pipeline, tmp_path, capsys):
    path = tmp_path / "infer.csv"
    words = ["--quick", "--device", "cpu", "--batch", "1", "--steps", "1", "--no-cold", "--out", str(tmp_path)]
    assert infer.main([*words, "--form", "captured", "fused", "diffusers"]) == 0
    rows = {row["backend"]: row for row in read(path)}
    assert list(rows["fused"]) == columns(sampling.PictureRow)
    captured = rows.pop("captured")
    assert captured["status"] == "skipped: the UNet's step cannot be captured: no CUDA device"
    assert not captured["ms_p50"] and not captured["unet_launches"]
    for row in rows.values():
        assert row["status"] == "ok" and row["size"] == "64x64 b1" and row["device"].startswith("CPU")
        assert float(row["s_per_image"]) == pytest.approx(float(row["ms_p50"]) / 1000, rel=1e-4)
        assert float(row["images_per_s"]) == pytest.approx(1 / float(row["s_per_image"]), rel=1e-4)
        assert float(row["unet_launches"]) > layers(pipeline)
    printed = capsys.readouterr().out
    assert "TOY MODEL" in printed and printed.count(" x diffusers") == 1


def test_launches_are_those_of_every_step_for_one_picture(pipeline):
    counted = {}
    for size, steps in ((ONE, 1), (ONE, 100), (Size(64, 2), 100)):
        form = infer_forms.FORMS["eager"](pipeline, size)
        counted[size.batch, steps] = sampling.unet_launches(form, steps, torch.device("cpu"))
        form.close()
    assert counted[1, 1] > layers(pipeline) > 0
    assert counted[1, 100] == 100 * counted[1, 1] == 2 * counted[2, 100]


def test_a_form_that_draws_something_else_gets_no_number(pipeline, monkeypatch):
    class Spoiled(infer_forms.StockPipeline):
        def draw(self, num_steps, output_type="np"):
            return 1.001 * super().draw(num_steps, output_type)

    monkeypatch.setitem(sampling.FORMS, "diffusers", Spoiled)
    args, cpu = infer.parse(["--quick", "--steps", "1", "--dtype", "fp32"]), torch.device("cpu")
    row = sampling.measure_form("diffusers", pipeline, ONE, {}, args, cpu)
    assert row.status.startswith("mismatch: latents off by 1.0e-03") and row.ms_p50 is row.s_per_image is None


def test_memory_that_is_out_costs_its_own_row_only(pipeline, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    args, cpu, known = infer.parse(["--quick", "--steps", "1", "--dtype", "fp32"]), torch.device("cpu"), {}
    with monkeypatch.context() as short:
        short.setattr(infer_forms, "latents", full)
        row = sampling.measure_form("eager", pipeline, ONE, known, args, cpu)
    assert row.status == "ran out of memory: CUDA out of memory" and row.ms_p50 is None
    assert not pipeline.unet._forward_pre_hooks and pipeline.unet.dtype == torch.float32 and not known


@pytest.mark.slow
def test_the_first_picture_of_a_process_is_timed_in_a_process(tmp_path):
    path = tmp_path / "infer.csv"
    assert infer.main(["--quick", "--device", "cpu", "--batch", "1", "--form", "eager", "--out", str(tmp_path)]) == 0
    (row,) = [row for row in read(path) if row["mode"] == "cold start"]
    warm = next(row for row in read(path) if row["mode"] == "sample")
    assert row["status"] == "ok" and row["call"] == "no kernel to compile"
    assert float(row["ms_p50"]) > float(warm["ms_p50"]), "it loads the libraries and the models too"


def test_a_cold_start_is_what_its_process_says_or_its_last_line(tmp_path, monkeypatch):
    """The process itself: `test_the_first_picture_of_a_process_is_timed_in_a_process`."""
    said = [(0, "a notice\n" + json.dumps({"seconds": 2.5}), ""), (1, "", "a notice\ninfer: no such model\n")]
    words = []

    def stand_in(command, **_):
        words.append(command)
        code, out, err = said[len(words) - 1]
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", stand_in)
    args, cpu = infer.parse(["--quick", "--resolution", "64", "32", "--dtype", "fp32"]), torch.device("cpu")
    (fine,), (failed,) = (list(sampling.cold_rows(args, cpu)) for _ in range(2))
    assert (fine.mode, fine.call, fine.size) == ("cold start", "no kernel to compile", "32x32 b1")
    assert (fine.status, fine.ms_p50) == ("ok", 2500.0) and "2.50 s to the first picture" in fine.line()
    assert (failed.status, failed.ms_p50) == ("failed: infer: no such model", None)
    own = infer.parse(words[0][words[0].index("--first-picture") :])
    assert own.first_picture and (own.form, own.model, own.resolution, own.steps) == (["eager"], "toy", [32], 4)


def test_the_first_picture_is_counted_from_the_start_of_its_process(capsys):
    words = ["--quick", "--device", "cpu", "--first-picture", "--form", "eager", "--steps", "1"]
    assert infer.main([*words, "--since", str(time.time() - 1000)]) == 0
    assert 1000 < json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] < 1100
