"""The toy world in the form of published files: what they hold, against the scenes; the same bytes each time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sgg_fast.data.prepare.masks import mask_centre
from sgg_fast.toy import sets, world

NUM, SIZE, SEED = 10, 96, 4


def test_polygons_of_the_toy_files_cover_the_masks_exactly():
    rng = np.random.default_rng(0)
    for mask in (rng.random((20, 30)) < 0.5, np.ones((5, 7), bool), np.zeros((5, 7), bool)):
        polygons, (height, width) = sets._rectangles(mask), mask.shape
        if not mask.any():
            assert polygons == []
            continue
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        assert (coco_mask.decode(rle).astype(bool) == mask).all()
        ys, xs = np.nonzero(mask)
        assert mask_centre(polygons, width, height) == pytest.approx(
            ((xs + 0.5).mean() / width, (ys + 0.5).mean() / height)
        )


def test_the_toy_files_are_a_function_of_their_arguments(tmp_path, capsys):
    for form, write in (("vg", sets.write_vg), ("coco", sets.write_coco)):
        held = []
        for k, seed in enumerate((1, 1, 2)):
            write(tmp_path / f"{form}{k}", 10, seed, 64)
            files = sorted(p for p in (tmp_path / f"{form}{k}").rglob("*") if p.is_file())
            held.append({p.relative_to(tmp_path / f"{form}{k}"): p.read_bytes() for p in files})
        assert held[0] == held[1] != held[2] and len(held[0]) > 10
    assert sets.main(["vg", "--out", str(tmp_path), "--num", "3"]) == 2
    assert "--num must be at least 10" in capsys.readouterr().err


def made(form: str, out, capsys) -> str:
    """What the command prints."""
    argv = [form, "--out", str(out), "--num", str(NUM), "--size", str(SIZE), "--seed", str(SEED)]
    assert sets.main(argv) == 0
    return capsys.readouterr().out


def test_visual_genomes_files_name_what_the_scenes_show(tmp_path, capsys):
    said = made("vg", tmp_path / "vg", capsys)
    assert f"prepare vg --root {tmp_path / 'vg'} --out {tmp_path / 'vg_set'}" in said
    read = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "vg").glob("*.json")}
    assert [len(read["vg_splits"][split]) for split in ("train", "val", "test")] == [8, 1, 1]
    for i in range(NUM):
        scene = world.draw_scene(SEED, i, SIZE)
        objects, relations = read["attributes"][i]["attributes"], read["relationships"][i]["relationships"]
        names = [" ".join([*record.get("attributes", []), *record["names"]]) for record in objects]
        assert names == list(scene.graph.objects)
        boxes = np.array([[o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]] for o in objects])
        assert np.abs(boxes - scene.boxes * SIZE).max() <= 0.5
        place = {record["object_id"]: k for k, record in enumerate(objects)}
        told = [(place[r["subject"]["object_id"]], r["predicate"], place[r["object"]["object_id"]]) for r in relations]
        assert told == list(scene.graph.relations)
        with Image.open(tmp_path / "vg" / "images" / "VG_100K" / f"{i + 1}.jpg") as image:
            assert np.abs(np.asarray(image).astype(float) - scene.image).mean() < 8, "JPEG's noise"


def test_coco_stuffs_files_hold_every_mask_once(tmp_path, capsys):
    """Things as polygons, stuff as run lengths, and "other" for what the things cover."""
    made("coco", tmp_path, capsys)
    folder = tmp_path / "annotations"
    ids = {split: (folder / sets.LISTS / f"{split}-ids.txt").read_text().split() for split in ("train", "val")}
    assert [len(ids[split]) for split in ("train", "val")] == [8, 2]
    for split in ("train", "val"):
        files = [json.loads((folder / f"{kind}_{split}2017.json").read_text()) for kind in ("instances", "stuff")]
        names = {entry["id"]: entry["name"] for file in files for entry in file["categories"]}
        for image_id in map(int, ids[split]):
            scene = world.draw_scene(SEED, image_id - 1, SIZE)
            held, things = [], np.zeros((SIZE, SIZE), bool)
            for row in (row for file in files for row in file["annotations"] if row["image_id"] == image_id):
                shape = row["segmentation"]
                rle = shape if isinstance(shape, dict) else coco_mask.merge(coco_mask.frPyObjects(shape, SIZE, SIZE))
                held.append((names[row["category_id"]], coco_mask.decode(rle).astype(bool)))
                assert isinstance(shape, dict) == (row["category_id"] >= sets.FIRST_STUFF)
                assert row["area"] == held[-1][1].sum()
            for name, mask in zip(scene.graph.objects, scene.masks, strict=True):
                assert sum(kind == name.split()[-1] and (own == mask).all() for kind, own in held) == 1
                things |= mask & (name.split()[-1] not in sets.STUFF)
            others = [own for kind, own in held if kind == "other"]
            assert len(held) - len(others) == len(scene.masks)
            assert (np.any(others, axis=0) == things).all() if others else not things.any()
