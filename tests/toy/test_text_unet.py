"""The text-conditioned UNet of `toy-words`: what it is told, what it is watched by, the folder that training takes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_runs import trainer

from sgg_fast.graph import SceneGraph
from sgg_fast.recipes import recipe
from sgg_fast.toy import build, text_unet, world
from sgg_fast.toy.models import toy_tokenizer, weight_file

GRAPHS = [
    SceneGraph(("sheep", "red hat", "grass"), ((0, "near", 1),)),
    SceneGraph(("dog", "sky"), ((1, "above", 0), (0, "under", 1))),
]


def test_sentences_are_the_text_encoders_states_up_to_the_longest_end(foundation):
    texts = ["sheep near red hat, grass", "", "dog"]
    context, mask = text_unet.read_sentences(foundation, texts)
    states, end = foundation.towers.read(texts)[0], mask.sum(dim=1) - 1
    assert context.shape[1] == int(end.max()) + 1 < 77
    torch.testing.assert_close(context, states[:, : context.shape[1]])
    ids = foundation.towers.token_ids(texts)[:, 0]
    assert end.tolist() == (ids == foundation.tokenizer.eos_token_id).int().argmax(dim=1).tolist()
    assert mask[1].sum() == text_unet.NULL_TOKENS


def test_phrases_are_the_start_and_what_sgg_igs_tokens_begin_as(foundation):
    context, mask = text_unet.Phrases(foundation, GRAPHS).read([GRAPHS[0], None, GRAPHS[1]])
    said = ["sheep near red hat", "sheep", "red hat", "grass"]
    expected = foundation.towers.phrases(said).float()
    torch.testing.assert_close(context[0, 1:5], expected, rtol=2e-3, atol=2e-3)
    null = foundation.towers.read([""])[0][0]
    torch.testing.assert_close(context[:, 0], null[:1].expand(3, -1))
    torch.testing.assert_close(context[1, 1], null[1])
    assert mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3, [True] * 5]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A few steps of every part that `toy-words` has of its own, by the commands."""
    out = tmp_path_factory.mktemp("parts")
    shutil.copy(weight_file("vae"), out / "vae.safetensors")
    for part, scenes in (("clip", "100"), ("unet", "60")):
        argv = [part, "--data-set", "toy-words", "--out", str(out), "--steps", "2", "--scenes", scenes]
        assert build.main(argv) == 0
    assert build.main(["foundation", "--out", str(out)]) == 0
    return out


def test_the_parts_are_watched_and_drawn_once(parts):
    assert "x0 error sentences t 100-200" in (parts / "unet" / "log.txt").read_text()
    kept = json.loads((parts / "toy-words-60" / "graphs.json").read_text())
    scene = world.draw_scene(world.TRAIN_SEED, 59, spoken=True)
    assert kept[59] == [list(scene.graph.objects), [list(r) for r in scene.graph.relations]]
    own = toy_tokenizer(parts / "tokenizer")
    assert own.tokenize("in front of") == ["in</w>", "front</w>", "of</w>"] and len(own) != len(toy_tokenizer())


def test_the_foundation_holds_the_average_and_is_gone_on_with(parts, tmp_path):
    """From the folder alone, as a gate in git is: the UNet's weights are those, not new ones."""
    held = load_file(parts / "foundation" / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(parts / "unet" / "checkpoint" / "ema.safetensors")
    assert all(torch.equal(held[name], value.half()) for name, value in average.items())
    argv = ["unet", "--data-set", "toy-words", "--start", str(parts / "foundation"), "--first", "2", "--steps", "3"]
    assert build.main([*argv, "--scenes", "60", "--out", str(tmp_path)]) == 0
    further = load_file(tmp_path / "unet.safetensors")
    name = "down_blocks.1.resnets.0.conv1.weight"
    moved = (further[name].float() - held[name].float()).abs().max()
    assert 0 < moved < 1e-3 < held[name].float().abs().max(), "one step of warm-up, from those weights"
    assert build.main(["foundation", "--out", str(tmp_path)]) == 0
    for part in ("vae/diffusion_pytorch_model", "graph_clip/model", "text_encoder/model"):
        old, new = (load_file(base / "foundation" / f"{part}.safetensors") for base in (parts, tmp_path))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old), part
    assert build.main(["foundation", "--out", str(tmp_path / "empty")]) == 2
    assert build.main(["vae", "--start", str(parts / "foundation")]) == 2


def test_sgg_ig_trains_on_the_folder(parts, tmp_path):
    """With the short null condition, in both stages; the result draws."""
    settings = recipe("toy-words")
    flat = settings.flat()
    names = ("data", "null_tokens", "optimizer", "instance_codes", "relation_dropout", "accumulation_steps")
    own = {"model": str(parts / "foundation"), **{name: flat[name] for name in names}}
    assert own["null_tokens"] == text_unet.NULL_TOKENS and own["instance_codes"]
    trainer(tmp_path, "pretrain", **own).train()
    run = trainer(tmp_path, "finetune", **own)
    run.train()
    layers = run.engine.module.placement.layers
    assert len(layers) == 4 and tuple(run.foundation.unet.config.block_out_channels) == (64, 96, 128)
    from sgg_fast.drawing.models import load_model

    pipeline = load_model(str(tmp_path)).pipeline
    context, mask = pipeline.encode_graphs(GRAPHS)
    assert context.shape[1] == 8 and mask[0].sum() == 2 and mask[2].sum() == 2 + 1 + 3
    assert pipeline(GRAPHS, num_inference_steps=2, output_type="np").images.shape == (2, 64, 64, 3)
