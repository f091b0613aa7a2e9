"""How the toy's parts are trained, assembled, shipped and shown: a step each, on a world of a few scenes."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sgg_fast.drawing.models import SHIPPED, load_model
from sgg_fast.eval import report
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.loading import MANIFEST, digest
from sgg_fast.toy import models, parts, world


@pytest.fixture
def few_pictures(few_scenes, monkeypatch):
    """At most eight pictures wherever a part asks for hundreds, and small batches."""
    draw = parts.draw
    monkeypatch.setattr(parts, "draw", lambda seed, num, first=0: draw(seed, min(num, 8), first))
    for part in ("vae", "clip", "unet"):
        monkeypatch.setitem(parts.PARTS, part, partial(parts.PARTS[part], batch=4))


@pytest.fixture
def few_steps(monkeypatch):
    """Sentences are drawn with two sampling steps."""
    sample = parts.sample_latents
    monkeypatch.setattr(parts, "sample_latents", lambda *args: sample(*args[:3], 2, args[4]))


def weights_of(part: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the command wrote; it is the half of the moving average."""
    held = load_file(folder / f"{part}.safetensors")
    average = load_file(folder / part / "checkpoint" / "ema.safetensors")
    assert held.keys() == average.keys()
    assert all(torch.equal(held[name], average[name].to(held[name].dtype)) for name in held)
    return held


@pytest.mark.usefixtures("few_pictures", "few_steps")
def test_each_part_is_trained_on_those_before_it(tmp_path):
    for part, said in (("vae", "held-out PSNR"), ("clip", "image to text top-1"), ("unet", "sample sheet written")):
        args = argparse.Namespace(part=part, data_set="toy", out=tmp_path, steps=1, scenes=8, start=None, install=False)
        parts.build_part(args)
        assert weights_of(part, tmp_path)
        assert said in (tmp_path / part / "log.txt").read_text()
    with Image.open(tmp_path / "unet" / "samples" / "step-000001.png") as sheet:
        assert sheet.size == (12 * 64 * 3, 2 * 64 * 3)
        scene = world.draw_scene(world.HELD_OUT_SEED, 11).image
        assert (np.asarray(sheet)[:192:3, -192::3] == scene).all(), "the scene above what was drawn of its sentence"
    read = models.toy_foundation(weights=tmp_path)
    assert read.source == "toy models (trained: unet, vae, clip)"


def test_a_trained_vae_comes_nearer_to_its_pictures(few_pictures, tmp_path):
    """Two lines of one log: after one step, and after eight, in one folder."""
    for num_steps in (1, 8):
        parts.build_vae(tmp_path, num_steps, 8, batch=2)
    first, last = [
        float(line.split("PSNR ")[1].split()[0]) for line in (tmp_path / "vae" / "log.txt").read_text().splitlines()
    ]
    assert last > first + 0.01


def test_pictures_are_counted_from_first_on_and_compared_in_decibels(tmp_path):
    images = parts.draw(7, 2, first=3)
    assert (images[1] == world.draw_scene(7, 4).image).all() and images.shape == (2, 64, 64, 3)
    dark = np.zeros((2, 4, 4, 3), np.uint8)
    other = dark + np.array([5, 50], np.uint8)[:, None, None, None]
    expected = (20 * math.log10(255 / 5) + 20 * math.log10(255 / 50)) / 2
    assert parts.psnr(dark, other) == pytest.approx(expected), "a mean over pictures, not over pixels"
    parts.sheet([images, 255 - images], tmp_path / "new" / "sheet.png", zoom=2)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert (np.asarray(sheet)[::2, ::2][:64, 64:] == images[1]).all()
        assert (np.asarray(sheet)[1::2, 1::2][64:, :64] == 255 - images[0]).all()


def test_a_sentence_is_padded_to_the_longest_of_its_batch_and_its_pixels_are_clips(foundation):
    tokens = parts._tokens(foundation.clip_tokenizer, ["dog", "sheep above grass"])
    assert tokens["input_ids"].shape == (2, 5) and tokens["attention_mask"].sum(dim=1).tolist() == [3, 5]
    grey = np.full((1, 64, 64, 3), 127, np.uint8)
    pixels = parts.clip_pixels(foundation.clip, grey)[0, :, 0, 0]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's published ones
    torch.testing.assert_close(pixels, torch.tensor([(127 / 255 - m) / s for m, s in zip(mean, std, strict=True)]))


@pytest.mark.usefixtures("few_steps")
def test_texts_are_drawn_from_the_same_noise_and_guidance_pulls(foundation):
    drawn = parts.draw_texts(foundation, foundation.unet, ["dog", "dog", "house"])
    assert drawn.shape == (3, 64, 64, 3) and drawn.dtype == np.uint8
    again = parts.draw_texts(foundation, foundation.unet, ["dog", "dog", "house"])
    assert (drawn == again).all() and (drawn[0] != drawn[1]).any(), "noise of its own for each"
    other = parts.draw_texts(foundation, foundation.unet, ["house", "dog", "house"])
    assert (drawn[0] != other[0]).any() and np.abs(drawn[1:].astype(int) - other[1:]).max() <= 1
    less = parts.draw_texts(foundation, foundation.unet, ["dog", "dog", "house"], guidance=2.0)
    assert (less != drawn).any()


def test_a_foundation_is_assembled_from_the_average_of_a_unet_in_training(tmp_path):
    unet = models.toy_unet(wide=True)
    (tmp_path / "unet" / "checkpoint").mkdir(parents=True)
    save_file(unet.state_dict(), tmp_path / "unet" / "checkpoint" / "ema.safetensors")
    parts.assemble(tmp_path, tmp_path / "foundation")
    read = load_foundation(str(tmp_path / "foundation"), "")
    for name, value in unet.state_dict().items():
        assert torch.equal(read.unet.state_dict()[name], value.half().float())
    tower = read.clip.text_model.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in read.text_encoder.state_dict().items())
    others = models.toy_foundation(weights=None, wide=True)
    assert read.vae.config.scaling_factor == others.vae.config.scaling_factor
    assert str(tmp_path) not in (tmp_path / "foundation" / "unet" / "config.json").read_text()


def test_a_run_is_shipped_in_half_precision_with_its_own_sampler(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "run" / "finetune" / "pipeline")
    index = tmp_path / "run" / "finetune" / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sampling_steps": 99}))
    (index.parent / MANIFEST).unlink()  # as its message says for a folder that was changed on purpose
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "older").touch()
    parts.ship(tmp_path / "run", tmp_path / "shipped")
    assert not (tmp_path / "shipped" / "older").exists()
    scheduler = json.loads((tmp_path / "shipped" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    held = load_file(tmp_path / "shipped" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.float16}
    pipeline = load_model(str(tmp_path / "shipped")).pipeline
    assert pipeline.config.sampling_steps == parts.SAMPLING_STEPS


def test_the_mean_of_two_runs_is_shipped(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(SHIPPED, tmp_path / name / "finetune" / "pipeline")
    pipeline = tmp_path / "two" / "finetune" / "pipeline"
    (pipeline / MANIFEST).unlink()
    held = {}
    for part in ("unet", "graph_encoder"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        held[file] = load_file(pipeline / file)
        save_file({key: value + 1 for key, value in held[file].items()}, pipeline / file)
    parts.ship(tmp_path / "one", tmp_path / "shipped", tmp_path / "two")
    for file, values in held.items():
        found = load_file(tmp_path / "shipped" / file)
        for key, value in values.items():
            assert torch.equal(found[key], ((value.float() + (value + 1).float()) / 2).half()), key
    shutil.rmtree(pipeline / "unet")
    models.toy_unet().save_pretrained(pipeline / "unet")
    with pytest.raises(ValueError, match="two: its unet has other weights than that of"):
        parts.ship(tmp_path / "one", tmp_path / "shipped", tmp_path / "two")


def test_the_card_gets_what_was_measured_and_leaves_out_what_was_not(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "pipeline")
    drawn = {"entity recall": 0.875, "entity precision": 0.5, "relations if present": math.nan}
    pairs = {"pairs": 8, "both seen": 0.75, "follows": 0.625}
    none = {"pairs": 0, "both seen": math.nan, "follows": math.nan}
    result = {"data": "toy-words", "weights": digest(folder), "rows": {"drawn": drawn}}
    result |= {"per picture": {"entity recall": [[1.0, 0.75]]}}
    result |= {"whole": {"drawn": {"all": {"graphs": 2, "share": 0.5}}}}
    result |= {"counterfactual pairs": {"left/right": pairs, "above/below": none}}
    report.write_result(tmp_path, result)
    parts.put_on_card(folder, tmp_path, "toy, twice")
    card = (folder / "README.md").read_text()
    assert "| entity recall, 2 held-out graphs of toy-words | 0.875 |" in card and "| data | toy, twice |" in card
    assert "left/right as asked, 6 pairs of graphs" in card and "0.625" in card
    assert "| pictures without any fault, 2 held-out graphs of toy-words | 0.5 |" in card
    assert "with two of a kind" not in card and "apache-2.0" in card
    assert "above/below as asked" not in card and "relations if present" not in card
    assert load_model(str(folder)).pipeline is not None, "its files are sealed again"


def test_the_sheet_shows_scenes_beside_what_is_drawn(tmp_path):
    """On a white page, each scene enlarged without smoothing."""
    parts.draw_sheet(tmp_path / "sheet.png", num=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    scene = world.draw_scene(world.HELD_OUT_SEED, 0, spoken=True).image.repeat(3, axis=0).repeat(3, axis=1)
    corners = np.argwhere((pixels == scene[0, 0]).all(axis=-1))
    windows = (pixels[y : y + 192, x : x + 192] for y, x in corners)
    assert sum(window.shape == scene.shape and (window == scene).all() for window in windows) == 1
