"""Sources of every kind: sizes and crops against known pictures, mirrored samples, pictures as stored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from support.small_sets import SIDE, derived, draw, records, small_source, tagged
from support.vg_files import LOW, draw_images, plain_set

from sgg_fast.config import ConfigError, DataConfig
from sgg_fast.data import jsonl
from sgg_fast.data.cache import build_cache
from sgg_fast.data.images import size_of
from sgg_fast.data.prepare.vg import prepare
from sgg_fast.data.sources import folder_source, jsonl_source, open_source, toy_source, vg_source, with_mirrored
from sgg_fast.toy import world

WIDE, TALL = (60, 40), (40, 61)


def write_folder(folder: Path) -> Path:
    """A wide and a tall picture, and a wide one that its tag turns: before and after the pixels of a PNG, in a JPEG."""
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", WIDE).save(folder / "a.png")
    Image.new("RGB", TALL).save(folder / "b.webp")
    Image.new("RGB", WIDE).save(folder / "c.jpg", exif=turned)
    Image.new("RGB", WIDE).save(folder / "d.png", exif=turned)
    whole = (folder / "d.png").read_bytes()
    first = whole.index(b"eXIf") - 4
    last = first + 12 + int.from_bytes(whole[first : first + 4], "big")
    assert last < whole.index(b"IDAT") and whole[-12:].endswith(b"IEND\xaeB`\x82")
    (folder / "e.png").write_bytes(whole[:first] + whole[last:-12] + whole[first:last] + whole[-12:])
    for stem in "abcde":
        (folder / f"{stem}.json").write_text(json.dumps({"objects": ["sky"]}))
    return folder


def test_own_pictures_are_cut_in_their_middle_and_turned_ones_have_their_turned_size(tmp_path):
    source = folder_source(write_folder(tmp_path / "set"), 80)
    tall = [60, 40, 20, 0]
    expected = np.array([[40, 60, 0, 20], [61, 40, 20, 0], tall, tall, tall], np.float32)
    found = source.size_rows(range(5))
    assert found.dtype == np.float32 and np.array_equal(found, expected)
    mirrored = with_mirrored(source)
    assert np.array_equal(mirrored.size_rows(range(10)), np.tile(expected, (2, 1)))
    assert np.array_equal(mirrored.size_rows([7, 1]), expected[[2, 1]])


def test_sizes_are_read_from_headers(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set")

    def load(image: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert size_of(folder / "a.png") == WIDE and size_of(folder / "e.png") == WIDE
    sizes = [size_of(folder / name, upright=True) for name in ("b.webp", "c.jpg", "d.png")]
    assert sizes == [TALL, WIDE[::-1], WIDE[::-1]]


@pytest.mark.parametrize(("resize", "expected"), [("crop", [40, 48, 0, 3.2]), ("squash", [40, 48, 0, 0])])
def test_a_prepared_set_is_cut_as_its_rule_says(tmp_path, resize, expected):
    rows = records(draw(tmp_path / "images", 3))
    jsonl.write_set(tmp_path, {"kind": "folder", "resize": resize}, {"train": rows}, lambda: "{}")
    found = small_source(tmp_path).size_rows(range(3))
    assert np.array_equal(found, np.array([expected] * 3, np.float32))


@pytest.mark.parametrize("boxed", [True, False])
def test_pictures_with_boxes_have_their_stored_size(tmp_path, boxed):
    write_folder(tmp_path / "images")
    row = {"image": "c.jpg", "objects": ["sky"], **({"boxes": [[0, 0, 9, 9]]} if boxed else {})}
    jsonl.write_set(tmp_path, {"kind": "folder", "resize": "crop"}, {"train": [row]}, lambda: "{}")
    height, width, top, left = small_source(tmp_path).size_rows([0])[0]
    assert ((height, width), (top, left)) == (((40, 60), (0, 8)) if boxed else ((60, 40), (8, 0)))


def test_an_image_has_one_row_whatever_its_draws(tmp_path):
    rows = derived(draw(tmp_path / "images", 2))
    jsonl.write_set(tmp_path, {"kind": "coco", "resize": "squash", "relations": "derived"}, {"train": rows}, lambda: "")
    source = small_source(tmp_path, relation_draws=3, flip="swap")
    assert source.num_images == 4 and source.size_rows(range(4)).tolist() == [[40, 48, 0, 0]] * 4


def test_visual_genomes_pictures_are_whole(tmp_path):
    prepare(plain_set(3).write(tmp_path / "root"), tmp_path / "out", LOW)
    draw_images(tmp_path / "out" / "images", {f"VG_100K_{i % 2 + 1}/{i}.jpg": (300, 240 + i) for i in (1, 2, 3)})
    source = vg_source(tmp_path / "out", 64, check=False)
    numbers = [int(source.place(i).stem) for i in range(3)]
    assert source.size_rows(range(3)).tolist() == [[240 + i, 300, 0, 0] for i in numbers]


def test_a_toy_scene_is_its_own_original():
    source = toy_source(0, 3, 48)
    assert source.size_rows(range(3)).tolist() == [[48, 48, 0, 0]] * 3
    sized = dataclasses.replace(source, sizes=lambda i: (i, 2, 3, 4))
    assert sized.size_rows([2, 0]).tolist() == [[2, 2, 3, 4], [0, 2, 3, 4]]


def test_pictures_with_boxes_stay_as_stored_for_their_boxes_were_drawn_there(tmp_path):
    (tmp_path / "images").mkdir()
    tagged(tmp_path / "images" / "6.jpg", 6)
    row = {"image": "6.jpg", "objects": ["a"], "boxes": [[0, 0, 24, 24]]}
    jsonl.write_set(tmp_path, {"kind": "coco", "resize": "squash"}, {"train": [row]}, lambda: "{}")
    picture = jsonl_source(tmp_path, 24).load_image(0)
    assert (
        np.abs(picture[2].astype(int) - [0, 0, 255]).max() < 30
        or np.abs(picture[2].astype(int) - [255, 0, 0]).max() < 30
    )
    assert np.abs(picture[2].astype(int) - picture[-3]).max() > 200, "red and blue one above the other"


def test_a_mirrored_sample_is_the_mirrored_picture_with_its_words_swapped(data):
    source = small_source(data, flip="swap")
    for i in range(12):
        assert (source.load_image(12 + i) == source.load_image(i)[:, ::-1]).all()
        assert source.graphs[12 + i].objects == source.graphs[i].objects
        assert source.graphs[12 + i].relations == ((0, "right of", 2), (0, "standing on", 1))
        left, right = source.boxes(i), source.boxes(12 + i)
        assert np.allclose(left[:, 0], 1 - right[:, 2]) and np.allclose(left[:, [1, 3]], right[:, [1, 3]])
        assert (left[:, 2] > left[:, 0]).all() and (right[:, 2] > right[:, 0]).all()


def test_rows_of_a_set_are_packed_as_its_graphs(foundation):
    source = with_mirrored(toy_source(3, 4, 32))
    built = build_cache(source, foundation, torch.device("cpu"), with_latents=False, with_boxes=True, progress=False)
    assert built.boxes is not None and built.boxes.shape == (built.graphs.num_objects, 4)
    for i, graph in enumerate(source.graphs):
        first, last = built.graphs.object_ptr[i : i + 2].tolist()
        assert np.array_equal(built.boxes[first : last - 1], source.boxes(i)) and len(graph.objects) == last - 1 - first
        assert built.boxes[last - 1].tolist() == [0, 0, 1, 1]
    drawn = dataclasses.replace(source, graphs=[*source.graphs, *source.graphs], draws=2)
    assert np.array_equal(drawn.box_rows(range(8)), np.tile(source.box_rows(range(8)), (2, 1)))


def test_a_folder_is_opened_by_what_it_holds(data, made, tmp_path):
    """A prepared set, its cache, Visual Genome's layout, bare pictures and the drawn scenes, each with its split."""
    prepare(plain_set(3).write(tmp_path / "root"), tmp_path / "vg", LOW)
    for place, split, num, names in (
        (data, "train", 12, ("sheep", "grass", "thing 0")),
        (made, "train", 12, ("sheep", "grass", "thing 0")),
        (tmp_path / "vg", "val", 1, ("sky", "man", "tree")),
        (write_folder(tmp_path / "own"), "train", 5, ("sky",)),
    ):
        source = open_source(DataConfig(source=str(place), resolution=SIDE), 0, split, check=False)
        assert len(source) == source.num_images == num and source.graphs[0].objects == names, place
        assert (source.stored is not None) == (place is made)
    drawn = open_source(DataConfig(num_scenes=2, resolution=SIDE), seed=5)
    assert (drawn.load_image(1) == world.draw_scene(5, 1, SIDE).image).all() and len(drawn) == 2
    with pytest.raises(ConfigError, match=r"has a vocab\.json and no gone\.h5"):
        open_source(DataConfig(source=str(tmp_path / "vg")), 0, "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no image with a graph beside it"):
        open_source(DataConfig(source=str(tmp_path / "empty")), 0)


def test_visual_genomes_boxes_are_shares_of_the_picture(tmp_path):
    prepare(plain_set(2).write(tmp_path / "root"), tmp_path / "out", LOW)
    draw_images(tmp_path / "out" / "images", {f"VG_100K_{i % 2 + 1}/{i}.jpg": (300, 240) for i in (1, 2)})
    source = vg_source(tmp_path / "out", 64)
    expected = [[10 * k / 300, 5 * k / 240, (10 * k + 40) / 300, (5 * k + 50) / 240] for k in range(3)]
    assert np.allclose(source.boxes(1), expected)
    assert np.allclose(source.box_rows([0, 1]), [*expected, [0, 0, 1, 1]] * 2)


def test_turned_pictures_are_noted_as_they_are_read(tmp_path):
    source = folder_source(write_folder(tmp_path / "set"), 80)
    assert source.said_turned == "" and source.box_rows([0]) is None
    pictures = [source.load_image(i) for i in (0, 1, 3)]
    assert all(picture.shape == (80, 80, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert source.turned == {3}
    assert source.said_turned.endswith("set: 1 pictures are turned as their orientation tag says")
