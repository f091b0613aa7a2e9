"""`prepare laion-sg` and `prepare folder`: what is kept is what the files say; every fault is named and left out."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_sets import draw, dump, unusable

from sgg_fast.data import jsonl, show
from sgg_fast.data.cache import build_cache
from sgg_fast.data.images import ImageError, open_rgb
from sgg_fast.data.prepare import cache as cache_writer
from sgg_fast.data.prepare import folder as own
from sgg_fast.data.prepare import laion
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.sources import folder_source, jsonl_source, with_mirrored
from sgg_fast.eval import pictures
from sgg_fast.toy.models import toy_foundation


def record(k: int, **changes: Any) -> dict[str, Any]:
    """A record with every field of the published files."""
    return {
        "img_id": str(480_000 + k), "name": f"{k}.jpg", "caption_ori": "a view", "score": "6.66", "url": "http://x.org/a",
        "items": [
            {"item_id": 0, "label": "mountains", "attributes": ["rocky", "tall"], "global_item_id": 10 * k},
            {"item_id": 1, "label": "river", "attributes": [], "global_item_id": 10 * k + 1},
        ],
        "relations": [{"triple_id": 0, "item1": 0, "relation": "behind", "item2": 1, "global_relation_id": k}],
        **changes,
    }  # fmt: skip


def lines(out: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def faults(report) -> dict[tuple[str, str], list[str]]:
    return {(fault["file"], fault["reason"]): fault["where"] for fault in report.document()["faults"]}


def test_laion_records_become_graphs_with_attributes_in_front(tmp_path, capsys):
    train = dump(tmp_path / "t.json", [record(1), record(2, relations=[])])
    val = dump(tmp_path / "v.json", [record(3)])
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (40, 20), (9, 90, 200)).save(tmp_path / "pictures" / name)
    argv = ["laion-sg", "--train", str(train), "--val", str(val), "--images", str(tmp_path / "pictures")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert lines(tmp_path / "out")[0] == {
        "id": "480001", "image": "1.jpg", "objects": ["rocky tall mountains", "river"],
        "relationships": [[0, "behind", 1]],
    }  # fmt: skip
    source = jsonl_source(tmp_path / "out", 32)
    assert len(source) == 2 and source.boxes is None
    assert abs(source.load_image(1).astype(int) - [9, 90, 200]).max() < 5 and source.load_image(1).shape == (32, 32, 3)
    assert len(jsonl_source(tmp_path / "out", 32, "val")) == 1
    assert "the paper's count" not in capsys.readouterr().out
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2


def test_faulty_laion_records_are_left_out_whole(tmp_path):
    items = record(0)["items"]
    relation = record(0)["relations"][0]
    bad = [
        (record(10, name="../10.jpg"), "image path that is absolute or leaves its folder", ""),
        (record(11, name="a\udcff.jpg"), "image name is not UTF-8", ""),
        (record(1), "image occurs again", ""),
        (record(12, items=None), "record without a list of items", ""),
        (record(13, items=[]), "graph without objects", ""),
        (record(14, items=[items[0], {**items[1], "item_id": 0}]), "item id occurs again", ""),
        (
            record(15, relations=[{**relation, "item2": 7}]),
            "there is no object with id 7 in the graph",
            "relations[0].item2",
        ),
        (record(16, items=[{**items[0], "label": ""}, items[1]]), "a name must be a non-empty string", "items[0]"),
        (record(17, items=[{**items[0], "label": "\udcff"}, items[1]]), "lone surrogate", "items[0]"),
        (
            record(18, items=[{**items[0], "attributes": [3]}, items[1]]),
            "a name must be a non-empty",
            "items[0].attributes[0]",
        ),
        (["x"], "record that is not an object", ""),
    ]
    twice = record(2, relations=[relation, {**relation, "item2": 0}, dict(relation)])
    path = dump(tmp_path / "t.json", [record(1), *(row for row, _, _ in bad), twice])
    report = laion.prepare({"train": path}, tmp_path / "out")
    assert [line["image"] for line in lines(tmp_path / "out")] == ["1.jpg", "2.jpg"]
    assert lines(tmp_path / "out")[1]["relationships"] == [[0, "behind", 1]]
    assert report.parts["relations"] == {"of an item to itself": 1, "exact repeat": 1}
    found = {place.split()[1]: (place, reason) for (_, reason), places in faults(report).items() for place in places}
    assert len(found) == len(bad) == len(report.dropped["train"]["faulty record"])
    for number, (_, reason, at) in enumerate(bad, start=1):
        place, said = found[str(number)]
        assert reason in said and place.endswith(at), (place, said)


def test_a_file_of_another_kind_says_so(tmp_path, capsys):
    path = dump(tmp_path / "t.json", [{"image_id": 1, "objects": []}])
    assert main(["laion-sg", "--train", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "none of 1 records can be used; is it one of LAION-SG's annotation files" in capsys.readouterr().err
    assert main(["laion-sg", "--train", str(tmp_path / "no.json"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def graph(path: Path, *names: str) -> None:
    path.write_text(json.dumps({"objects": list(names), "relationships": [[0, "near", 1]]}))


def test_a_folder_is_checked_file_by_file(tmp_path, capsys):
    root = tmp_path / "mine"
    for sub in ("", "more/deep"):
        for name in draw(root / sub, 3):
            graph((root / sub / name).with_suffix(".json"), "cat", f"mat {name}")
    bad = unusable()
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
        graph((root / name).with_suffix(".json"), "a", "b")
    for name, content in (
        ("two", [{"objects": ["a"]}] * 2),
        ("loop", {"objects": ["a"], "relationships": [[0, "x", 5]]}),
    ):
        draw(root / "x", 1)
        (root / "x" / "p0.png").rename(root / f"{name}.png")
        dump(root / f"{name}.json", content)
    (root / "x" / "lonely.png").write_bytes((root / "p0.png").read_bytes())
    graph(root / "pictureless.json", "a", "b")
    odd = os.fsencode(root) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes((root / "p0.png").read_bytes())
    report = own.prepare(root, tmp_path / "out")
    kept = [line["image"] for line in lines(tmp_path / "out")]
    assert kept == ["more/deep/p0.png", "more/deep/p1.png", "more/deep/p2.png", "p0.png", "p1.png", "p2.png"]
    named = {place: reason for (_, reason), places in faults(report).items() for place in places}
    assert named.keys() == {*bad, "two.png", "loop.png", "x/lonely.png", "pictureless.json", "\\xff.png"}
    assert all(said in named[name] for name, (_, said) in bad.items())
    assert named["two.png"] == "2 graphs where there must be one" and "object index 5" in named["loop.png"]
    assert "cannot be read: No such file" in named["x/lonely.png"] and "not UTF-8" in named["\\xff.png"]
    assert named["pictureless.json"] == "no picture of the same name"
    source = jsonl_source(tmp_path / "out", 32)
    assert source.graphs[0].objects == ("cat", "mat p0.png") and source.load_image(5).shape == (32, 32, 3)


def test_images_set_aside_stay_where_they_are_when_others_come(tmp_path):
    root = tmp_path / "mine"
    for name in draw(root, 40):
        graph((root / name).with_suffix(".json"), "a", "b")
    for path in list(root.glob("p3*")):
        path.rename(tmp_path / path.name)
    own.prepare(root, tmp_path / "out", val_share=0.4)
    before = {split: {line["image"] for line in lines(tmp_path / "out", split)} for split in ("train", "val")}
    assert len(before["val"]) > 5 and len(before["train"]) > 10 and not before["val"] & before["train"]
    for path in tmp_path.glob("p3*"):
        path.rename(root / path.name)
    own.prepare(root, tmp_path / "out", val_share=0.4, overwrite=True)
    for split in ("train", "val"):
        assert before[split] < {line["image"] for line in lines(tmp_path / "out", split)}


@pytest.mark.parametrize(("flags", "reason"), [
    (["--root", "none"], "there is no such folder"), (["--root", ".", "--val-share", "1"], "--val-share must lie"),
])  # fmt: skip
def test_what_cannot_run_is_one_line(tmp_path, capsys, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    assert main(["folder", *flags, "--out", "out"]) == 2 and reason in capsys.readouterr().err
    assert main(["folder", "--root", ".", "--out", "out"]) == 2
    assert "no image with a usable graph beside it" in capsys.readouterr().err


def tagged(path: Path, orientation: int) -> np.ndarray:
    """A picture, red left and blue right when upright, stored as a camera that was held so; its upright pixels."""
    upright = np.zeros((24, 48, 3), np.uint8)
    upright[:, :24, 0], upright[:, 24:, 2] = 255, 255
    undo = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    picture, exif = Image.fromarray(upright), Image.Exif()
    picture = picture if undo[orientation] is None else picture.transpose(undo[orientation])
    exif[0x0112] = orientation
    picture.save(path, quality=100, subsampling=0, exif=exif)
    return upright


def test_own_pictures_are_turned_as_their_tag_says_and_counted(tmp_path, capsys):
    root = tmp_path / "mine"
    root.mkdir()
    for orientation in (1, 3, 6, 8):
        tagged(root / f"{orientation}.jpg", orientation)
        graph(root / f"{orientation}.json", "a", "b")
    assert main(["folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"turned upright by their orientation tag +3", capsys.readouterr().out)
    for source in (jsonl_source(tmp_path / "out", 24), with_mirrored(folder_source(root, 24))):
        first = source.load_image(0)
        assert len(source) in (4, 8) and first[:, 2, 0].min() > 200 and first[:, -3, 2].min() > 200
        assert all(np.abs(source.load_image(i).astype(int) - first).max() < 30 for i in (1, 2, 3))
        assert source.turned == {1, 2, 3} and "3 pictures are turned as their" in source.said_turned


def test_turned_pictures_are_counted_by_cache_and_training_and_sheet(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foundation = toy_foundation()
    monkeypatch.setattr(cache_writer, "open_foundation", lambda config: foundation)
    root = tmp_path / "mine"
    root.mkdir()
    for orientation in (1, 6, 8):
        tagged(root / f"{orientation}.jpg", orientation)
        graph(root / f"{orientation}.json", "a", "b")
    argv = ["cache", "--data", str(root), "--resolution", "32", "--out", "cache", "--shard-size", "2"]
    for _ in range(2):  # made, then found complete
        assert main([*argv, "--token-init", "none"]) == 0
        assert "- turned upright by their orientation tag: 2\n" in capsys.readouterr().out
    assert json.loads(Path("cache/report.json").read_text())["turned_upright"] == 2
    build_cache(folder_source(root, 32), foundation, torch.device("cpu"), with_latents=False)
    assert "2 pictures are turned as their orientation tag says" in caplog.text
    assert show.main([str(root), "--n", "3", "--out", "sheet.png"]) == 0
    assert "2 pictures are turned as their orientation tag says" in capsys.readouterr().err
    graphs = pictures.open_graphs(str(root), 32)
    assert graphs.image(1).shape == (32, 32, 3) and graphs.turned == {1}


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


@pytest.mark.parametrize("value", [9, 60678])
def test_a_damaged_orientation_tag_is_named_not_guessed(tmp_path, value):
    path = tmp_path / "a.jpg"
    tagged(path, 6)
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[0x0112] = value
        picture.save(path, exif=exif)
    with pytest.raises(ImageError, match=f"its orientation tag is {value}, not 1 to 8; save the picture anew"):
        open_rgb(path, upright=True)
    Image.fromarray(np.asarray(open_rgb(path))).save(path)  # the cure
    assert open_rgb(path, upright=True).size == (24, 48)


def test_endings_in_capitals_belong_together(tmp_path):
    root = tmp_path / "mine"
    (one,) = draw(root, 1)
    for picture, file in (("UPPER.PNG", "UPPER.json"), ("lower.png", "lower.JSON"), ("BOTH.PNG", "BOTH.JSON")):
        (root / picture).write_bytes((root / one).read_bytes())
        graph(root / file, "a", "b")
    (root / one).unlink()
    report = own.prepare(root, tmp_path / "out")
    assert not report.faults and report.kept["train"] == 3 == len(folder_source(root, 24))


def test_a_set_that_comes_to_nothing_leaves_its_report_and_the_same_command_goes_over_it(tmp_path, capsys):
    root, out = tmp_path / "mine", tmp_path / "out"
    (name,) = draw(root, 1)
    argv = ["folder", "--root", str(root), "--out", str(out)]
    assert main(argv) == 2
    assert "p0.png: cannot be read" in capsys.readouterr().err and "p0.png" in (out / "report.json").read_text()
    graph((root / name).with_suffix(".json"), "a", "b")
    assert main(argv) == 0 and main(argv) == 2, "now a set is there"
    assert main(["folder", "--root", str(root), "--out", str(root)]) == 2
    assert "is --root itself; give another folder" in capsys.readouterr().err
