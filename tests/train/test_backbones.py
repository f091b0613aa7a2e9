"""Every command on folders shaped like Stable Diffusion v2.1 and SDXL base, scaled down; v1.4 is in test_sd_folder.py.

The matrix is backbone x command: pre-training, fine-tuning, resuming, ds.json, LoRA, baselines, a prepared cache, the
plan, drawing, and training from the result.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from support import DS_JSON, ROOT, sd_folder
from support.sd_folder import KINDS, POOLED
from support.tiny_runs import lines, rows, same_weights, weights

import infer
import train
from sgg_fast.config import ConfigError
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.prepare.__main__ import main as prepare
from sgg_fast.drawing.models import load_model
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.pipeline_parts import read_index
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe

RECIPE = {"sd21": "vg512-sd21", "sdxl": "laion1024-sdxl"}
SHRUNK = ["--resolution", "64", "--width", "32", "--num-layers", "2", "--log-every", "1", "--num-samples", "1",
          "--sheet-steps", "2", "--sample-every", "2", "--num-negatives", "3", "--geometry", "0",
          "--attention-loss", "0", "--checkpoint-every", "2", "--token-init", "text"]  # fmt: skip


@pytest.fixture(scope="module", params=["sd21", "sdxl"])
def folders(request, tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp(request.param)
    return {
        "model": sd_folder.write_sd(base / request.param, kind=request.param),
        "clip": sd_folder.write_clip(base / "clip"),
        "data": sd_folder.write_pairs(base / "data"),
        "out": base / "run",
    }


def argv(folders: dict[str, Path], stage: str, *words: str, **changes: Path) -> list[str]:
    places = {**folders, **changes}
    flags = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    return ["--stage", stage, "--recipe", RECIPE[folders["model"].name], *SHRUNK, *flags, *words]


@pytest.fixture(scope="module")
def run(folders) -> Path:
    """Both stages; fine-tuning stops after two steps and is resumed."""
    assert train.main(argv(folders, "pretrain", "--steps", "2")) == 0
    for steps in ("2", "3"):
        assert train.main(argv(folders, "finetune", "--steps", steps)) == 0
    return folders["out"]


def test_both_stages_train_and_resume(run, folders):
    assert list(rows(run / "pretrain")) == [1, 2] and list(rows(run / "finetune")) == [1, 2, 3]
    assert [line["step"] for line in lines(run / "finetune") if line.get("event") == "start"] == [0, 2]
    assert all(0 <= value < 100 for row in rows(run / "finetune").values() for value in row.values())


def test_a_resumed_run_ends_where_a_whole_one_does(run, folders, tmp_path):
    encoder = str(run / "pretrain" / "graph_encoder")
    assert train.main(argv(folders, "finetune", "--steps", "3", "--graph-encoder", encoder, out=tmp_path)) == 0
    assert same_weights(tmp_path / "finetune" / "pipeline", run / "finetune" / "pipeline")


def test_only_the_unet_moves_and_loads_in_stock_diffusers(run, folders):
    result = run / "finetune" / "pipeline"
    before, after = weights(folders["model"]), weights(result)
    for file in before:
        assert before[file].keys() == after[file].keys(), file
        moved = max((before[file][k] - after[file][k].float()).abs().max().item() for k in before[file])
        assert (moved > 0) == file.startswith("unet"), file
    unet, info = UNet2DConditionModel.from_pretrained(result, subfolder="unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert unet.config.use_linear_projection and unet.config.cross_attention_dim == 24 + 32 * (POOLED in pooled(result))


def pooled(result: Path) -> set[int]:
    """Width of the pooled vector of a result, if it has one."""
    return {json.loads((result / "graph_encoder" / "config.json").read_text())["pooled_dim"]} - {0}


def test_sdxls_own_pipeline_takes_the_trained_unet(run, folders):
    if folders["model"].name != "sdxl":
        pytest.skip("SDXL only")
    unet = UNet2DConditionModel.from_pretrained(run / "finetune" / "pipeline", subfolder="unet")
    stock = StableDiffusionXLPipeline.from_pretrained(folders["model"], unet=unet.float())
    stock.set_progress_bar_config(disable=True)
    image = stock("sheep on grass", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_the_result_draws_and_a_relation_changes_the_picture(run, tmp_path):
    out = tmp_path / "a.png"
    assert infer.main([str(ROOT / "graph.json"), "--model", str(run), "--out", str(out), "--steps", "2"]) == 0
    assert Image.open(out).size == (64, 64)
    pipeline = SceneGraphToImagePipeline.from_pretrained(run / "finetune" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    graphs = parse_scene_graphs(
        [{"objects": ["sky", "grass"], "relationships": [[0, word, 1]]} for word in ("above", "below")]
    )
    drawn = [
        pipeline(graph, 2, generator=torch.Generator().manual_seed(0), output_type="pt").images[0]
        for graph in (*graphs, graphs[0])
    ]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_the_result_keeps_what_further_training_needs(run, folders, tmp_path):
    result, xl = run / "finetune" / "pipeline", folders["model"].name == "sdxl"
    assert read_index(result)["force_zeros_for_empty_prompt"] == xl
    state = load_file(result / "graph_encoder" / "diffusion_pytorch_model.safetensors")
    assert state["null_states"].any() != xl and state["start_state"].any()
    foundation = load_foundation(str(result), "")
    assert foundation.empty_is_zero == xl and len(foundation.text_encoders) == 1 + xl
    again = argv({**folders, "model": folders["model"]}, "pretrain", "--steps", "1")
    places = {"--model": str(result), "--out": str(tmp_path / "run")}
    for flag, value in places.items():
        again[again.index(flag) + 1] = value
    del again[again.index("--clip") : again.index("--clip") + 2]
    assert train.main(again) == 0
    assert rows(tmp_path / "run" / "pretrain")[1] == pytest.approx(rows(run / "pretrain")[1], rel=1e-4)


def test_under_deepspeed(run, folders, tmp_path):
    words = ["--steps", "2", "--weights", "master", "--no-optimizer-in-backward", "--sample-every", "0",
             "--max-grad-norm", "1", "--deepspeed", DS_JSON,
             "--graph-encoder", str(run / "pretrain" / "graph_encoder")]  # fmt: skip
    assert train.main(argv(folders, "finetune", *words, out=tmp_path)) == 0
    found, plain = rows(tmp_path / "finetune"), rows(run / "finetune")
    assert found[1]["loss"] == pytest.approx(plain[1]["loss"], rel=2e-2)


def test_lora_trains_and_draws(run, folders, tmp_path):
    words = ["--steps", "2", "--lora", "2", "--lora-targets", "convolutions",
             "--graph-encoder", str(run / "pretrain" / "graph_encoder")]  # fmt: skip
    assert train.main(argv(folders, "finetune", *words, out=tmp_path)) == 0
    result = tmp_path / "finetune" / "pipeline"
    assert read_index(result)["force_zeros_for_empty_prompt"] == (folders["model"].name == "sdxl")
    drawn = infer.main(
        [str(ROOT / "graph.json"), "--model", str(result), "--out", str(tmp_path / "a.png"), "--steps", "2"]
    )
    assert drawn == 0
    assert load_model(str(result)).pipeline.text_encoder is not None


@pytest.mark.parametrize("words", [["text"], ["text", "--text-form", "phrases"], ["sgdiff"]], ids=" ".join)
def test_baselines_train(folders, tmp_path, words):
    own = ["--conditioner", *words, "--steps", "1", "--sample-every", "1"]
    assert train.main(argv(folders, "finetune", *own, out=tmp_path)) == 0
    assert 0 < rows(tmp_path / "finetune")[1]["loss"] < 100


def test_a_prepared_cache_trains_like_the_set(run, folders, tmp_path):
    named = [word for name in ("model", "clip", "data") for word in (f"--{name}", str(folders[name]))]
    cache = tmp_path / "cache"
    words = ["cache", *named, "--recipe", RECIPE[folders["model"].name], "--resolution", "64", "--token-init", "text"]
    words += ["--out", str(cache)]
    assert prepare(words) == 0
    phrases = load_file(cache / "graphs.safetensors")["phrases"]
    backbone = load_foundation(str(folders["model"]), str(folders["clip"])).backbone
    assert phrases.shape[1] == backbone.row_dim and phrases.dtype == torch.float16
    words = ["--steps", "2", "--sample-every", "0", "--graph-encoder", str(run / "pretrain" / "graph_encoder")]
    assert train.main(argv(folders, "finetune", *words, data=cache, out=tmp_path / "run")) == 0
    for step, row in rows(tmp_path / "run" / "finetune").items():
        own = rows(run / "finetune")[step]
        assert row["diff"] == pytest.approx(own["diff"], rel=2e-2), step


def test_the_plan_reads_the_folder(folders, capsys):
    assert train.main(argv(folders, "finetune", "--plan")) == 0
    said = capsys.readouterr().out
    assert f"with {folders['model']} at 64 x 64" in said and "peak, in " in said


@pytest.mark.parametrize("name", RECIPE.values())
def test_recipes_name_what_they_need(name):
    with pytest.raises(ConfigError, match=r"needs --model: a Stable Diffusion (v2\.1|XL base) folder"):
        recipe(name, data=str(ROOT)).check_given()
    assert set(KINDS) > set(RECIPE)
