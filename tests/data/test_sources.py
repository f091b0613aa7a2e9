"""Original sizes and crops of the pictures of every kind of source, against pictures whose sizes are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from support.small_sets import derived, draw, records, small_source
from support.vg_files import LOW, draw_images, plain_set

from sgg_fast.data import jsonl
from sgg_fast.data.images import size_of
from sgg_fast.data.prepare.vg import prepare
from sgg_fast.data.sources import folder_source, toy_source, vg_source, with_mirrored

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
