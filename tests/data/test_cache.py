"""Outputs of the frozen models: computed or read from a cache the same bits; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.sd_folder import KINDS
from support.small_sets import SIDE, cache_of, derived, draw, files_of, records, small_job, small_source

from sgg_fast.commands import NotFiniteError
from sgg_fast.config import ConfigError, DataConfig, ModelConfig
from sgg_fast.data import jsonl
from sgg_fast.data.cache import build_cache, fingerprint, open_foundation, text_fingerprint, to_bytes, to_pixels
from sgg_fast.data.moments import MomentRows
from sgg_fast.data.prepare import cache as writer
from sgg_fast.data.prepare.cache import write_cache
from sgg_fast.data.prepare.job import CacheJob
from sgg_fast.data.shards import entry_of, read_index, read_tensors, write_index, write_tensors
from sgg_fast.data.sources import PairSource, open_source, toy_source
from sgg_fast.data.stored import StoredCache
from sgg_fast.toy.models import toy_foundation

CPU = torch.device("cpu")


@pytest.mark.parametrize("flip", ["none", "swap"])
def test_what_is_read_is_what_the_models_give(data, tmp_path, foundation, flip):
    """Same batches in memory and on disk: same bits, for images, latents, names, phrases and packed graphs."""
    out = cache_of(data, tmp_path / "cache", shard_size=4, flip=flip)
    direct, stored = (
        build_cache(small_source(folder, flip=flip), foundation, CPU, True, True, batch_size=4, progress=False)
        for folder in (data, out)
    )
    assert len(stored) == len(direct) == (24 if flip == "swap" else 12)
    assert list(stored.table.names) == direct.table.names
    assert list(stored.table.phrases) == list(direct.table.phrases)
    for name in ("names", "images", "phrases"):
        assert getattr(stored, name).equal(getattr(direct, name)), name
    every = torch.arange(len(direct))
    assert stored.moments[every].equal(direct.moments)
    stored.moments.bring(every.numpy(), CPU)
    assert stored.latents(every, torch.zeros(1)).equal(direct.latents(every, torch.zeros(1)))
    for name, value in vars(direct.graphs).items():
        assert (np.asarray(getattr(stored.graphs, name)) == np.asarray(value)).all(), name
    assert list(small_source(out, flip=flip).graphs) == list(small_source(data, flip=flip).graphs)


def test_each_draw_of_relations_is_a_sample_of_the_same_image(tmp_path, foundation):
    rows = derived(draw(tmp_path / "set" / "images", 6))
    header = {"kind": "coco", "resize": "squash", "relations": "derived"}
    jsonl.write_set(tmp_path / "set", header, {"train": rows}, lambda: "{}")
    out = cache_of(tmp_path / "set", tmp_path / "cache", shard_size=4, relation_draws=3, flip="swap")
    cache = build_cache(small_source(out, relation_draws=3, flip="swap"), foundation, CPU, True)
    source = small_source(tmp_path / "set", relation_draws=3, flip="swap")
    assert len(source) == len(cache) == 3 * 2 * 6 and source.num_images == 12
    assert cache.images[:12].equal(cache.images[12:24]) and cache.images[:12].equal(cache.images[24:])
    index = torch.tensor([1, 13, 25])
    assert cache.moments[index][0].equal(cache.moments[index][1]) and cache.moments[index][0].equal(
        cache.moments[index][2]
    )
    assert not cache.moments[index][0].equal(cache.moments[torch.tensor([7])][0]), "7 is 1 mirrored"
    drawn = [source.graphs[d * 12 : d * 12 + 6] for d in range(3)]
    assert all(a != b for k, a in enumerate(drawn) for b in drawn[:k]), "draws differ"
    assert all(len(set(g.relations)) == len(g.relations) > 0 for graphs in drawn for g in graphs)
    with pytest.raises(ConfigError, match=r"prepared with --relation-draws 3, not 1; give that flag"):
        small_source(out, flip="swap")


def without_sizes(folder: Path) -> Path:
    """The cache in `folder` as an older version wrote it."""
    tensors, note = read_tensors(folder / "graphs.safetensors")
    kept = {name: np.array(value) for name, value in tensors.items() if name != "picture_sizes"}
    write_tensors(folder / "graphs.safetensors", kept, note)
    write_index(folder, {**read_index(folder), "graphs": entry_of(folder / "graphs.safetensors")})
    return folder


@pytest.fixture(scope="module")
def xl(foundation):
    """The toy's models around a UNet that reads sizes."""
    return dataclasses.replace(foundation, unet=UNet2DConditionModel(**KINDS["sdxl"].unet, norm_num_groups=8))


def test_sdxl_gets_the_sizes_of_its_pictures_from_the_set_and_from_the_cache(tmp_path, foundation, xl):
    rows = derived(draw(tmp_path / "set" / "images", 6))
    for i, row in enumerate(rows):
        draw(tmp_path / "other", 1, size=(48 + i, 40))
        shutil.copy(tmp_path / "other" / "p0.png", tmp_path / "set" / "images" / row["image"])
    header = {"kind": "coco", "resize": "crop", "relations": "derived"}
    jsonl.write_set(tmp_path / "set", header, {"train": rows}, lambda: "{}")
    out = cache_of(tmp_path / "set", tmp_path / "cache", shard_size=4, relation_draws=2, flip="swap")
    expected = torch.tensor([[40, 48 + i, 0, (8 + i) // 2 * SIDE / 40] for i in range(6)]).repeat(4, 1)
    for folder in (tmp_path / "set", out):
        source = small_source(folder, relation_draws=2, flip="swap")
        assert build_cache(source, xl, CPU, True, progress=False).sizes.equal(expected), folder
        assert build_cache(source, xl, CPU, False, progress=False).sizes is None, "pre-training has no UNet"
        assert build_cache(source, foundation, CPU, True, progress=False).sizes is None


def test_an_older_cache_says_that_it_lacks_sizes_and_the_same_command_adds_them(
    data, made, tmp_path, foundation, xl, monkeypatch, caplog
):
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    folder = without_sizes(Path(shutil.copytree(made, tmp_path / "cache")))
    build_cache(small_source(folder), foundation, CPU, True)
    assert not caplog.records, "only SDXL reads them"
    assert build_cache(small_source(folder), xl, CPU, True).sizes.tolist() == [[SIDE, SIDE, 0, 0]] * 12
    (record,) = caplog.records
    assert "lacks the sizes of its pictures" in record.getMessage() and "same `prepare cache`" in record.getMessage()
    said: list[str] = []
    write_cache(small_job(data, folder), say=said.append)
    assert said == ["3 of 3 shards are there already"] and files_of(folder) == files_of(made)
    assert build_cache(small_source(folder), xl, CPU, True).sizes.tolist() == [[40, 48, 0, 0]] * 12
    assert len(caplog.records) == 1


def test_a_cache_of_other_models_is_refused(data, made, tmp_path, monkeypatch):
    other = toy_foundation(seed=1, weights=None)
    source = small_source(made)
    with pytest.raises(ConfigError, match="prepared with another clip; give the same --clip"):
        build_cache(source, other, CPU, False)
    mixed = toy_foundation()
    mixed.vae = other.vae
    assert len(build_cache(source, mixed, CPU, False)) == 12, "pre-training does not read latents"
    with pytest.raises(ConfigError, match="prepared with another vae; give the same --model"):
        build_cache(source, mixed, CPU, True)
    monkeypatch.setattr("sgg_fast.data.prepare.cache.open_foundation", lambda config: other)
    with pytest.raises(ConfigError, match="another clip, another vae"):
        write_cache(small_job(data, made))


@pytest.mark.parametrize(("part", "flag"), [("vae", "--model: the VAE"), ("clip", "--clip: the image tower")])
def test_a_model_that_gives_nan_makes_no_cache(tmp_path, monkeypatch, part, flag):
    foundation = toy_foundation()
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    weight = foundation.vae.encoder.conv_out.bias if part == "vae" else foundation.clip.visual_projection.weight
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    rows = records(draw(tmp_path / "set" / "images", 3))
    jsonl.write_set(tmp_path / "set", {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
    with pytest.raises(NotFiniteError, match=f"{flag} gives numbers that are not finite: get the model again"):
        cache_of(tmp_path / "set", tmp_path / "cache", token_init="none")
    assert not (tmp_path / "cache" / "index.json").exists() and not list((tmp_path / "cache").glob("*.safetensors"))
    foundation = toy_foundation()  # the cure
    assert len(StoredCache(cache_of(tmp_path / "set", tmp_path / "cache", token_init="none")).graphs) == 3


def test_pixels_and_bytes_are_each_others_inverse():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1 and pixels[0, 0, 0].diff().allclose(torch.tensor(2 / 255))
    assert (to_bytes(pixels) == images).all()
    assert to_bytes(torch.full((1, 3, 1, 1), 7.0)).tolist() == [[[[255, 255, 255]]]], "beyond the range is clipped"
    for value in (torch.nan, torch.inf):
        with pytest.raises(NotFiniteError, match="a picture of the VAE has numbers that are not finite"):
            to_bytes(torch.full((1, 3, 2, 2), value))


def test_models_are_known_by_their_weights(foundation):
    opened = open_foundation(ModelConfig())
    assert all(fingerprint(getattr(opened, part)) == fingerprint(getattr(foundation, part)) for part in ("clip", "vae"))
    assert text_fingerprint(opened) == text_fingerprint(foundation) == fingerprint(foundation.text_encoders[0])
    layer, seen = torch.nn.Linear(2, 2), set()
    for change in (lambda: None, lambda: layer.bias.data.add_(1e-6), lambda: layer.half(), lambda: layer.to("cpu")):
        change()
        seen.add(fingerprint(layer))
    assert len(seen) == 3, "a move changes nothing"
    encoders = (foundation.text_encoders[0], layer)
    both = text_fingerprint(types.SimpleNamespace(text_encoders=encoders))
    assert both not in map(fingerprint, encoders)
    assert both != text_fingerprint(types.SimpleNamespace(text_encoders=encoders[::-1]))


def test_latents_are_samples_of_the_posterior_wherever_the_moments_lie(data, foundation):
    held, rows = (
        build_cache(small_source(data), foundation, CPU, True, progress=False, latents_device=where)
        for where in ("auto", "cpu")
    )
    index = torch.tensor([3, 0, 7])
    assert isinstance(rows.moments, MomentRows) and rows.moments[index].equal(held.moments[index])
    rows.moments.bring(index.numpy(), CPU)
    noise = torch.randn(3, *held.latent_shape, generator=torch.Generator().manual_seed(0))
    mean, variance = held.moments[index].float().chunk(2, dim=1)
    sampled = mean + variance.exp().sqrt() * noise
    assert rows.latent_shape == held.latent_shape == noise.shape[1:]
    assert rows.latents(index, noise).equal(held.latents(index, noise)) and torch.allclose(
        held.latents(index, noise), sampled, atol=1e-5
    )


def test_a_cache_moves_as_a_whole(data, foundation):
    cache = build_cache(small_source(data), foundation, CPU, True, True, True, progress=False)
    moved = cache.to(torch.device("meta"))
    assert len(moved.tensors()) == len(cache.tensors()) > 15
    assert {tensor.device.type for tensor in moved.tensors()} == {"meta"} and len(moved) == 12


def test_a_prepared_cache_keeps_them(tmp_path, foundation, monkeypatch):
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    data = DataConfig(num_scenes=5, resolution=32)
    write_cache(CacheJob(ModelConfig(token_init="none"), data, 0, tmp_path, batch_size=5), say=lambda line: None)
    stored = open_source(dataclasses.replace(data, source=str(tmp_path)), seed=0)
    device = torch.device("cpu")
    built = build_cache(stored, foundation, device, with_latents=False, with_boxes=True, progress=False)
    assert np.array_equal(built.boxes, open_source(data, seed=0).box_rows(range(5)))
    del stored.stored.arrays["boxes"]
    with pytest.raises(ConfigError, match=r"^--geometry and --attention-loss: .* no boxes; prepare the cache"):
        build_cache(stored, foundation, device, with_latents=False, with_boxes=True, progress=False)


def test_a_set_without_boxes_is_refused_in_one_line(foundation):
    source = toy_source(3, 2, 32)
    bare = PairSource(source.graphs, source.load_image, "pictures")
    with pytest.raises(ConfigError, match=r"^--geometry .* pictures has no boxes; train with [^\n]*$"):
        build_cache(bare, foundation, torch.device("cpu"), with_latents=False, with_boxes=True, progress=False)
    short = dataclasses.replace(source, boxes=lambda i: source.boxes(i)[:1])
    with pytest.raises(ConfigError, match="image 0 has 1 boxes"):
        short.box_rows([0])
