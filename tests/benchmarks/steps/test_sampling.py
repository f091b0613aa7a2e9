"""`benchmarks.infer`: forms that draw the same, numbers only for those, counts that add up; the toy model on a CPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, infer
from benchmarks.harness.output import columns
from benchmarks.steps import infer_forms, sampling
from benchmarks.steps.forms import Size
from sgg_fast.nn.fuse import FusedResnetBlock2D
from sgg_fast.pipeline import SceneGraphToImagePipeline

ONE = Size(64, 1)


@pytest.fixture(scope="module")
def pipeline() -> SceneGraphToImagePipeline:
    return infer_forms.open_models("toy", torch.device("cpu"), torch.float32)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_all_forms_that_run_here(tmp_path, capsys):
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
        assert float(row["unet_launches"]) > 300
    printed = capsys.readouterr().out
    assert "TOY MODEL" in printed and printed.count(" x diffusers") == 1


def test_launches_are_those_of_every_step_for_one_picture(pipeline):
    counted = {}
    for size, steps in ((ONE, 1), (ONE, 100), (Size(64, 2), 100)):
        form = infer_forms.FORMS["eager"](pipeline, size)
        counted[size.batch, steps] = sampling.unet_launches(form, steps, torch.device("cpu"))
        form.close()
    assert counted[1, 1] > 300
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


def test_a_closed_form_leaves_stock_models_behind(pipeline):
    form = infer_forms.FORMS["fused"](pipeline, ONE)
    assert any(type(module) is FusedResnetBlock2D for module in pipeline.unet.modules())
    form.close()
    assert not any(type(module) is FusedResnetBlock2D for module in pipeline.unet.modules())
    assert all(p.is_contiguous() for p in pipeline.unet.parameters())
    form = infer_forms.FORMS["diffusers"](pipeline, ONE)
    assert pipeline.unet._forward_pre_hooks
    form.close()
    assert not pipeline.unet._forward_pre_hooks and pipeline.vae.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_the_true_sizes_are_refused_without_a_gpu(capsys):
    assert infer.main([]) == 2
    assert capsys.readouterr().err == "infer: the true sizes need a GPU; --quick draws with the toy model here\n"


def test_the_suite_begins_with_the_headlines_and_ends_with_the_regression_check():
    names = [part.name for part in gpu_suite.PARTS]
    assert names[:3] == ["pretrain_step", "train_step", "infer"] and names[-1] == "regress"
    files = {word for part in gpu_suite.PARTS for word in part.command if word.startswith("{out}/")}
    assert len(files | {"environment.json", "summary.json", "logs.tar.gz"}) <= gpu_suite.MAX_FILES


def test_without_a_model_it_is_of_stable_diffusions_size():
    """Built without memory."""
    pipeline = infer_forms.open_models(None, torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 859_520_964
    assert (pipeline.unet.dtype, pipeline.vae.dtype, pipeline.vae_scale_factor) == (torch.float16, torch.float32, 8)
    assert pipeline.graph_encoder.config.context_dim == 768 and pipeline.scheduler.config.steps_offset == 1


@pytest.mark.slow
def test_the_first_picture_of_a_process_is_timed_in_a_process(tmp_path):
    path = tmp_path / "infer.csv"
    assert infer.main(["--quick", "--device", "cpu", "--batch", "1", "--form", "eager", "--out", str(tmp_path)]) == 0
    (row,) = [row for row in read(path) if row["mode"] == "cold start"]
    warm = next(row for row in read(path) if row["mode"] == "sample")
    assert row["status"] == "ok" and row["call"] == "no kernel to compile"
    assert float(row["ms_p50"]) > float(warm["ms_p50"]), "it loads the libraries and the models too"


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "g.json").write_text("{}")
    assert infer.main(["--model", str(tmp_path / "g.json"), "--resolution", "32", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("infer: ") and "no pipeline there" in err[-1]
