"""Every command on folders shaped like Stable Diffusion v2.1 and SDXL base, scaled down; v1.4 is in test_sd_folder.py.

The matrix is backbone x command: pre-training, fine-tuning, resuming, ds.json, LoRA, baselines, a prepared cache, the
plan, drawing, and training from the result.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from support import DS_JSON, ROOT, sd_folder
from support.cases.stage import settings
from support.sd_folder import KINDS, POOLED
from support.tiny_runs import lines, rows, same_weights, weights
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import infer
import train
from sgg_fast.config import Config, ConfigError
from sgg_fast.data.cache import build_cache
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.prepare.__main__ import main as prepare
from sgg_fast.data.sources import open_source
from sgg_fast.drawing.models import load_model
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.pipeline_parts import read_index
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines import captured as capturing
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation

RECIPE = {"sd21": "vg512-sd21", "sdxl": "laion1024-sdxl"}
CPU = torch.device("cpu")
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


def test_sdxls_autoencoder_decodes_in_fp32(run, folders):
    """Its activations exceed fp16's range; v2's stay in the dtype that was asked for."""
    pipeline = SceneGraphToImagePipeline.from_pretrained(run / "finetune" / "pipeline", torch_dtype=torch.float16)
    seen: list[torch.dtype] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    pipeline.decode(torch.zeros(1, 4, 8, 8, dtype=torch.float16), "pt")
    assert seen == [torch.float32 if folders["model"].name == "sdxl" else torch.float16]
    assert pipeline.vae.dtype == torch.float16


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
    own = ["--conditioner", *words, "--relation-dropout", "0", "--steps", "1", "--sample-every", "1"]
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


def watched(unet: torch.nn.Module) -> list[torch.Tensor]:
    """The sizes of each call of a UNet, as they come."""
    seen: list[torch.Tensor] = []
    unet.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["added_cond_kwargs"]["time_ids"].clone()), with_kwargs=True
    )
    return seen


def size_settings(folders: dict[str, Path], **changes: object) -> Config:
    places = {"model": str(folders["model"]), "clip": str(folders["clip"]), "data": str(folders["data"])}
    return settings(**places, resolution=64, batch_size=2, token_init="none", **changes)


def test_sdxl_reads_the_size_and_the_crop_of_each_picture(folders):
    if folders["model"].name != "sdxl":
        pytest.skip("SDXL only")
    config = size_settings(folders, flip="swap")
    models, source = load_foundation(config.model.source, config.model.clip), open_source(config.data, 0)
    cache = build_cache(source, models, CPU, with_latents=True, progress=False)
    stage = assemble(config, "finetune", models, blank_conditioner(config.model, models), cache, CPU)
    seen = watched(stage.unet)
    stage(np.array([3, 0, 6, 1]), 0)
    high, wide, square, panorama = (
        [96, 64, 16, 0, 64, 64], [70, 90, 0, 10 * 64 / 70, 64, 64], [64, 64, 0, 0, 64, 64], [40, 200, 0, 128, 64, 64]
    )  # fmt: skip
    assert torch.equal(seen[0], torch.tensor([panorama, wide, square, high]))
    assert cache.sizes[:4].equal(cache.sizes[4:]), "mirrored"


def test_a_captured_step_of_sdxl_reads_the_sizes_of_its_samples(folders, monkeypatch):
    """The same rows and losses as the plain engine's, with micro-batches; another size is another loss."""
    if folders["model"].name != "sdxl":
        pytest.skip("SDXL only")
    monkeypatch.setattr(capturing, "WARM_UP_STEPS", 1)
    config = size_settings(folders, accumulation_steps=2, optimizer="adam", unet_lr=1e-3, graph_lr=1e-3)
    engines, sizes = [], torch.arange(16.0).reshape(4, 4) * 9
    for kind, given in ((EagerEngine, sizes), (CapturedEngine, sizes), (EagerEngine, sizes.flip(0))):
        torch.manual_seed(0)
        models = blank_foundation(config.model)
        cache = dataclasses.replace(blank_cache(config, models, 4), sizes=given)
        stage = assemble(config, "finetune", models, blank_conditioner(config.model, models), cache, CPU)
        engines.append(kind(stage, CPU))
    plain, captured, _ = engines
    seen = watched(plain.module.unet), watched(captured.module.unet)
    for step, ids_KB in enumerate(np.array([[[0, 3], [2, 1]], [[1, 2], [3, 0]]])):
        expected, found, elsewhere = (one.update(ids_KB, step) for one in engines)
        assert found.applied
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value, rtol=1e-3, atol=1e-5)
        assert abs(elsewhere.losses["diff"] - expected.losses["diff"]) > 1e-5
        rows = [torch.cat([sizes[ids], torch.full((2, 2), 64.0)], dim=1) for ids in ids_KB]
        for own in seen:
            assert all(map(torch.equal, own[-2:], rows))


def test_the_pipeline_takes_diffusers_sizes(folders):
    """By default the picture is its own original; Stable Diffusion v2 refuses what its UNet does not read."""
    pipeline = SceneGraphToImagePipeline.from_pretrained(
        sd_folder.write_pipeline(folders["out"].parent / "own", folders["model"].name)
    )
    pipeline.set_progress_bar_config(disable=True)
    graph, wanted = SceneGraph(("sky",)), {"original_size": (40, 200), "crops_coords_top_left": (0, 128)}
    if folders["model"].name != "sdxl":
        with pytest.raises(ValueError, match="only SDXL"):
            pipeline(graph, 1, resolution=64, **wanted)
        return
    seen = watched(pipeline.unet)
    pipeline(graph, 1, resolution=64, output_type="latent")
    pipeline(graph, 1, height=64, width=32, output_type="latent", **wanted)
    own, given = [64, 64, 0, 0, 64, 64], [40, 200, 0, 128, 64, 32]
    assert [rows.tolist() for rows in seen] == [[own, own], [given, given]]


def test_the_plan_reads_the_folder(folders, capsys):
    assert train.main(argv(folders, "finetune", "--plan")) == 0
    said = capsys.readouterr().out
    assert f"with {folders['model']} at 64 x 64" in said and "peak, in " in said


@pytest.mark.parametrize("name", RECIPE.values())
def test_recipes_name_what_they_need(name):
    with pytest.raises(ConfigError, match=r"needs --model: a Stable Diffusion (v2\.1|XL base) folder"):
        recipe(name, data=str(ROOT)).check_given()
    assert set(KINDS) > set(RECIPE)


def write_toy_xl(folder: Path) -> Path:
    """The toy's autoencoder, CLIP and (twice) text tower around a small UNet of SDXL's shape, with random weights."""
    toy = toy_foundation()
    width, projected = toy.text_encoder.config.hidden_size, toy.clip.config.projection_dim
    second = CLIPTextModelWithProjection(CLIPTextConfig(**toy.clip.config.text_config.to_dict()))
    second.text_model.load_state_dict(toy.text_encoder.state_dict())
    second.text_projection.load_state_dict(toy.clip.text_projection.state_dict())
    torch.manual_seed(0)
    sizes = {
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": 1,
        "cross_attention_dim": 2 * width,
        "projection_class_embeddings_input_dim": 6 * 8 + projected,
    }
    unet = UNet2DConditionModel(**{**KINDS["sdxl"].unet, **sizes}, sample_size=16, norm_num_groups=16)
    parts = {"unet": unet, "vae": toy.vae, "text_encoder": toy.text_encoder, "text_encoder_2": second,
             "tokenizer": toy.tokenizer, "tokenizer_2": toy.tokenizer, "scheduler": KINDS["sdxl"].scheduler,
             "graph_clip": toy.clip, "graph_tokenizer": toy.clip_tokenizer}  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
def test_a_toy_through_sdxls_classes_learns(tmp_path):
    """The loss falls below its value at chance; one relation flipped, from the same noise, is another picture."""
    model, steps = write_toy_xl(tmp_path / "xl"), 150
    flags = ["--model", str(model), "--out", str(tmp_path / "run"), "--width", "32", "--num-layers", "2",
             "--num-scenes", "64", "--batch-size", "4", "--sample-every", "0", "--unet-lr", "1e-3",
             "--log-every", "10"]  # fmt: skip
    assert train.main(["--stage", "pretrain", *flags, "--steps", "30"]) == 0
    assert train.main(["--stage", "finetune", *flags, "--steps", str(steps)]) == 0
    last = rows(tmp_path / "run" / "finetune")[steps]
    assert last["loss"] < 0.8 * last["loss_at_chance"] and last["diff"] < 0.6 * last["diff_at_chance"]
    pipeline = SceneGraphToImagePipeline.from_pretrained(tmp_path / "run" / "finetune" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pair = [SceneGraph(("sheep", "house"), ((0, word, 1),)) for word in ("left of", "right of")]
    drawn = [pipeline(graph, 4, generator=torch.Generator().manual_seed(0), output_type="pt").images for graph in pair]
    assert (drawn[0] - drawn[1]).abs().mean() > 1e-4
