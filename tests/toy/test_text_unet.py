"""The text-conditioned UNet of `toy-words`: what it is told, what it is watched by, the folder that training takes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_runs import trainer

from sgg_fast.config import ConfigError
from sgg_fast.data.cache import open_foundation
from sgg_fast.diffusion import noise
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.foundation import Foundation
from sgg_fast.recipes import recipe
from sgg_fast.toy import build, gates, text_unet, world
from sgg_fast.toy.fit import learning_rate
from sgg_fast.toy.models import toy_foundation, toy_tokenizer, weight_file
from sgg_fast.toy.noise_levels import BANDS, object_cells, x0_errors

GRAPHS = [
    SceneGraph(("sheep", "red hat", "grass"), ((0, "near", 1),)),
    SceneGraph(("dog", "sky"), ((1, "above", 0), (0, "under", 1))),
]


@pytest.fixture(scope="module")
def foundation() -> Foundation:
    return toy_foundation()


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


def test_the_error_of_a_perfect_prediction_is_nothing_and_of_none_is_the_variance(foundation):
    scenes = [world.draw_scene(1, i, spoken=True) for i in range(6)]
    latents = text_unet.encode(foundation, np.stack([scene.image for scene in scenes]))
    abar = foundation.scheduler.alphas_cumprod
    true = iter([latents[rows] for _ in BANDS for rows in (slice(0, 4), slice(4, 8))])

    def perfect(z, t, rows):
        z_0, a = next(true), abar[t][:, None, None, None]
        eps = (z - a.sqrt() * z_0) / (1 - a).sqrt()
        return noise.target_of("v_prediction", z_0, eps, abar[t])

    def zero(z, t, rows):  # v that says z_0 = 0
        a = abar[t][:, None, None, None]
        return a.sqrt() / (1 - a).sqrt() * z

    found = x0_errors(perfect, latents, abar, scenes, batch=4)
    assert max([*found.everywhere.values(), *found.objects.values()]) < 1e-6
    found = x0_errors(zero, latents, abar, scenes, batch=4)
    cells = object_cells(scenes, 16)[:, None]
    assert found.everywhere[BANDS[0]] == pytest.approx(float(latents.square().mean()), rel=1e-3)
    on_objects = float((latents.square() * cells).sum() / (4 * cells.sum()))
    assert found.objects[BANDS[-1]] == pytest.approx(on_objects, rel=1e-3)
    assert "t 200-400" in str(found)


def test_cells_show_things_not_grounds():
    scene = world.draw_scene(1, 0, spoken=True)
    names = [name.split()[-1] for name in scene.graph.objects]
    things = [
        k for k, name in enumerate(names) if name not in ("sky", "grass", "sea", "sand", "snow", "leaves", "flowers")
    ]
    share = object_cells([scene], 16)[0]
    assert float(share.mean()) == pytest.approx(scene.masks[things].any(axis=0).mean(), abs=1e-6)
    assert 0 < len(things) < len(names)


def test_the_rate_stays_then_falls():
    rates = [learning_rate(step, 1000, 1.0, constant_until=0.7) for step in (0, 99, 100, 699, 850, 999)]
    assert rates[0] == 0.01 and rates[1:4] == [1.0] * 3 and 0.4 < rates[4] < 0.6 and rates[5] < 0.02
    assert learning_rate(300, 1000, 1.0, constant_until=0.7, first=300) == 0.01, "warm-up again, without a checkpoint"
    assert learning_rate(500, 1000, 1.0) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * 400 / 900)))


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
    with pytest.raises(
        ConfigError, match=r"needs --model: the foundation that `python -m sgg_fast\.toy\.build foundation`"
    ):
        open_foundation(settings.model)
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


def test_only_what_it_has_of_its_own_is_built_for_toy_words(capsys):
    assert build.main(["detector", "--data-set", "toy-words"]) == 2
    assert "--data-set toy-words has clip, unet, detector_words of its own" in capsys.readouterr().err


def test_a_run_is_measured_and_what_cannot_be_is_refused(trained_run, capsys):
    for data in ("toy", "toy-words"):
        assert gates.main(["--model", str(trained_run), "--data", data, "--num", "4"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("x0 error: t 100-200 ") and said.count("objects") == len(BANDS)
    assert gates.main(["--model", "./nowhere"]) == 2
    assert capsys.readouterr().err.startswith("toy.gates: --model ./nowhere")
