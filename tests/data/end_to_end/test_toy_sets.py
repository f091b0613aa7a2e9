"""From published files to a fine-tuning step by the commands alone: the toy world in both formats, real annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import flags, rows
from support.vg_files import SAMPLE, draw_images, real, sample_root

import train
from sgg_fast.data import show
from sgg_fast.data.prepare.__main__ import main as prepare
from sgg_fast.data.sources import jsonl_source, vg_source
from sgg_fast.data.spatial import spatial_predicate
from sgg_fast.data.stored import StoredCache
from sgg_fast.toy import sets, world

NUM, SIZE, SEED = 12, 208, 4
LOW = [f"--min-{what}-instances=1" for what in ("object", "attribute", "relation")]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Published form in coco/, prepared in coco_set/, cached in coco_cache/."""
    base = tmp_path_factory.mktemp("coco")
    assert (
        sets.main(["coco", "--out", str(base / "coco"), "--num", str(NUM), "--size", str(SIZE), "--seed", str(SEED)])
        == 0
    )
    where = ["--root", str(base / "coco"), "--out", str(base / "coco_set"), "--images", str(base / "coco")]
    assert prepare(["coco", *where, "--num-val", "1", "--num-test", "1"]) == 0
    argv = ["cache", "--data", str(base / "coco_set"), "--out", str(base / "coco_cache"), "--flip", "swap"]
    assert prepare([*argv, "--relation-draws", "2", "--shard-size", "8"]) == 0
    return base


@pytest.fixture(scope="module")
def vg(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("vg")
    assert (
        sets.main(["vg", "--out", str(base / "vg"), "--num", str(NUM), "--size", str(SIZE), "--seed", str(SEED)]) == 0
    )
    where = ["--root", str(base / "vg"), "--out", str(base / "vg_set"), "--images", str(base / "vg" / "images")]
    assert prepare(["vg", *where, *LOW, "--min-object-size", "8"]) == 0
    return base


@pytest.fixture(scope="module")
def pretrained(coco) -> Path:
    argv = ["--stage", "pretrain", "--data", str(coco / "coco_cache"), "--out", str(coco / "run")]
    assert train.main([*argv, *flags(flip="swap", relation_draws=2, pretrain_steps=2)]) == 0
    return coco / "run"


def test_coco_form_trains_from_its_cache(coco, pretrained):
    argv = ["--stage", "finetune", "--data", str(coco / "coco_cache"), "--out", str(pretrained)]
    assert train.main([*argv, *flags(flip="swap", relation_draws=2, finetune_steps=1, sample_every=1)]) == 0
    assert list(rows(pretrained / "finetune")) == [1]
    sheet = np.asarray(Image.open(pretrained / "finetune" / "samples" / "step-0000001.png"))
    source = jsonl_source(coco / "coco_set", 64)
    assert (sheet[:64, :64] == source.load_image(0)).all() and (sheet[:64, 64:] == source.load_image(1)).all()


def test_vg_form_trains_from_its_cache(vg, pretrained, tmp_path):
    cache = ["cache", "--data", str(vg / "vg_set"), "--out", str(tmp_path / "cache"), "--attributes", "first"]
    assert prepare(cache) == 0
    argv = ["--stage", "finetune", "--data", str(tmp_path / "cache"), "--out", str(tmp_path / "run"),
            "--graph-encoder", str(pretrained / "pretrain" / "graph_encoder")]  # fmt: skip
    assert train.main([*argv, *flags(attributes="first", finetune_steps=1)]) == 0
    assert list(rows(tmp_path / "run" / "finetune")) == [1]


def test_vg_form_says_what_the_scenes_are(vg):
    """Names with their colour, relations, boxes to a pixel, pictures but for JPEG's noise."""
    source = vg_source(vg / "vg_set", SIZE, first_attribute=True)
    assert len(source) == NUM * 8 // 10
    for i in range(len(source)):
        scene = world.draw_scene(SEED, i, SIZE)
        assert source.graphs[i].objects == scene.graph.objects
        assert set(source.graphs[i].relations) == set(scene.graph.relations)
        assert np.abs(source.boxes(i) - scene.boxes).max() <= 1 / SIZE
        assert np.abs(source.load_image(i).astype(float) - scene.image).mean() < 6


def test_coco_form_says_what_the_scenes_are(coco):
    """Things and stuff above two per cent of the picture, and relations as sg2im derives them from the exact masks."""
    lines = [json.loads(line) for line in (coco / "coco_set" / "train.jsonl").read_text().splitlines()]
    source = jsonl_source(coco / "coco_set", SIZE, draws=2)
    seen = 0
    for i, line in enumerate(lines):
        scene = world.draw_scene(SEED, line["id"] - 1, SIZE)
        expected = {}
        for name, mask in zip(scene.graph.objects, scene.masks, strict=True):
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
            if box[2] * box[3] > 0.02 * SIZE**2:
                expected[(name.split()[-1], *map(int, box))] = ((xs + 0.5).mean() / SIZE, (ys + 0.5).mean() / SIZE)
        found = {(n, *map(int, b)): c for n, b, c in zip(line["objects"], line["boxes"], line["centres"], strict=True)}
        assert found.keys() == expected.keys()
        assert all(np.abs(np.subtract(found[key], expected[key])).max() < 1e-5 for key in found)
        for graph in (source.graphs[i], source.graphs[len(lines) + i]):
            keys = list(found)
            for s, predicate, o in graph.relations:
                (a, b), d = ([k[1], k[2], k[1] + k[3], k[2] + k[4]] for k in (keys[s], keys[o])), np.subtract(
                    expected[keys[s]], expected[keys[o]])  # fmt: skip
                assert predicate == spatial_predicate(a, b, d)
                seen += 1
    assert seen > 40


@real
def test_real_annotations_become_a_cache_and_a_sheet(tmp_path, capsys):
    """Visual Genome's own records of five images, placeholders of the true size; the graphs come back as prepared."""
    root, out = sample_root(tmp_path / "root", {"train": [1, 2, 3], "val": [4], "test": [5]}), tmp_path / "out"
    sizes = {"/".join(r["url"].split("/")[-2:]): (r["width"], r["height"])
             for r in json.loads((SAMPLE / "image_data.json").read_text())}  # fmt: skip
    draw_images(tmp_path / "images", sizes)
    low = [f"--min-{what}-instances=2" for what in ("object", "attribute", "relation")]
    where = ["--root", str(root), "--out", str(out), "--images", str(tmp_path / "images"), "--any-version"]
    assert prepare(["vg", *where, *low]) == 0
    assert prepare(["cache", "--data", str(out), "--out", str(tmp_path / "cache"), "--resolution", "32"]) == 0
    assert list(StoredCache(tmp_path / "cache").graphs) == vg_source(out, 32).graphs
    assert show.main([str(tmp_path / "cache"), "--out", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
