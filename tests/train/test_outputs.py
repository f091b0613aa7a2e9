"""The outputs of a run: sample sheets, the pipeline around the current models, the folder of the result."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from support.tiny_runs import lines, trainer

from sgg_fast.config import ConfigError
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.toy.world import draw_scene
from sgg_fast.train.outputs import export, lora_base


def test_sample_sheets_show_real_pictures_above_drawn_ones(trained_run):
    sheets = sorted((trained_run / "finetune" / "samples").iterdir())
    assert [path.name for path in sheets] == ["step-0000002.png", "step-0000004.png"]
    sheet = Image.open(sheets[-1])
    assert (sheet.format, sheet.size, sheet.mode) == ("PNG", (128, 128), "RGB")
    real = Image.fromarray(draw_scene(0, 1, 64).image)
    assert sheet.crop((64, 0, 128, 64)).tobytes() == real.tobytes()
    low, high = zip(*sheet.crop((0, 64, 64, 128)).getextrema(), strict=True)
    assert max(h - lo for lo, h in zip(low, high, strict=True)) > 16, "something is drawn below"


def test_the_result_is_a_pipeline_folder_of_safetensors(trained_run):
    folder = trained_run / "finetune" / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SceneGraphToImagePipeline"
    weights = [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert weights == []
    pipeline = SceneGraphToImagePipeline.from_pretrained(folder)
    assert pipeline.config.resolution == 64 and pipeline.config.sampling_steps == 4
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")  # stock diffusers, ours not asked
    for name, tensor in pipeline.unet.state_dict().items():
        assert unet.state_dict()[name].equal(tensor)
    words = {name for i in range(8) for name in draw_scene(0, i).graph.names}
    assert set(pipeline.graph_encoder.config.trained_names) == words | {"__image__", "__in_image__"}


@pytest.mark.parametrize("name", ["sheet_steps", "sampling_steps"])
def test_steps_that_the_models_scheduler_cannot_take_are_refused_before_the_run(tmp_path, name):
    more = {"sample_every": 2, name: 1001}
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} 1001: this scheduler takes at most 999"):
        trainer(tmp_path, "finetune", **more)
    assert not (tmp_path / "finetune" / "log.jsonl").exists()
    trainer(tmp_path, "finetune", **more | {name: 999})  # the cure


def test_a_sheet_of_nan_is_not_saved_and_the_run_goes_on(tmp_path, caplog):
    run = trainer(tmp_path, "finetune", sample_every=2)
    with torch.no_grad():
        run.foundation.vae.decoder.conv_out.bias[0] = torch.nan
    run.train()
    assert not list(tmp_path.rglob("samples/*.png"))
    assert "no sample sheet at step 2: a picture ends in numbers that are not finite" in caplog.text
    said = [line for line in lines(tmp_path / "finetune") if line.get("event") == "no samples"]
    assert [line["step"] for line in said] == [2, 4] and "conv_out.bias of vae" in said[0]["reason"]


def test_a_lora_names_its_base_and_folders_by_their_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").mkdir()
    config = recipe("vg256", model="sd", clip="openai/clip-vit-base-patch32")
    assert lora_base(config) is None
    assert lora_base(config.replace(lora=4)) == {"model": str(tmp_path / "sd"), "clip": "openai/clip-vit-base-patch32"}
    assert lora_base(recipe("toy", lora=4)) == {"model": "", "clip": ""}
    assert lora_base(recipe("toy-words", lora=4)) == {"model": "toy-words", "clip": ""}


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """Complete or absent; what a failed one leaves aside is in nobody's way."""
    result = tmp_path / "graph_encoder"
    torch.manual_seed(0)
    first, second = (SceneGraphConditioner(name_dim=6, image_dim=5, context_dim=8, width=8, num_layers=1) for _ in "12")
    export(result, first)
    save = SceneGraphConditioner.save_pretrained

    def full(model, folder):
        save(model, folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(SceneGraphConditioner, "save_pretrained", full)
        with pytest.raises(OSError, match=rf"{result}: cannot be written \(No space left on device\)"):
            export(result, second)
    for expected in (first, second):
        found = SceneGraphConditioner.from_pretrained(result).state_dict()
        assert all(tensor.equal(found[name]) for name, tensor in expected.state_dict().items())
        export(result, second)
    assert [path.name for path in tmp_path.iterdir()] == ["graph_encoder"]
