"""`prepare folder`: what is kept is what the files say, upright; every fault is named and left out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from support.small_sets import draw, dump, faults, lines, tagged, unusable, write_graph

from sgg_fast.data.prepare import folder as own
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.sources import folder_source, jsonl_source, with_mirrored


def test_a_folder_is_checked_file_by_file(tmp_path, capsys):
    root = tmp_path / "mine"
    for sub in ("", "more/deep"):
        for name in draw(root / sub, 3):
            write_graph((root / sub / name).with_suffix(".json"), "cat", f"mat {name}")
    bad = unusable()
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
        write_graph((root / name).with_suffix(".json"), "a", "b")
    for name, content in (
        ("two", [{"objects": ["a"]}] * 2),
        ("loop", {"objects": ["a"], "relationships": [[0, "x", 5]]}),
    ):
        draw(root / "x", 1)
        (root / "x" / "p0.png").rename(root / f"{name}.png")
        dump(root / f"{name}.json", content)
    (root / "x" / "lonely.png").write_bytes((root / "p0.png").read_bytes())
    write_graph(root / "pictureless.json", "a", "b")
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
        write_graph((root / name).with_suffix(".json"), "a", "b")
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


def test_own_pictures_are_turned_as_their_tag_says_and_counted(tmp_path, capsys):
    root = tmp_path / "mine"
    root.mkdir()
    for orientation in (1, 3, 6, 8):
        tagged(root / f"{orientation}.jpg", orientation)
        write_graph(root / f"{orientation}.json", "a", "b")
    assert main(["folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"turned upright by their orientation tag +3", capsys.readouterr().out)
    for source in (jsonl_source(tmp_path / "out", 24), with_mirrored(folder_source(root, 24))):
        first = source.load_image(0)
        assert len(source) in (4, 8) and first[:, 2, 0].min() > 200 and first[:, -3, 2].min() > 200
        assert all(np.abs(source.load_image(i).astype(int) - first).max() < 30 for i in (1, 2, 3))
        assert source.turned == {1, 2, 3} and "3 pictures are turned as their" in source.said_turned


def test_endings_in_capitals_belong_together(tmp_path):
    root = tmp_path / "mine"
    (one,) = draw(root, 1)
    for picture, file in (("UPPER.PNG", "UPPER.json"), ("lower.png", "lower.JSON"), ("BOTH.PNG", "BOTH.JSON")):
        (root / picture).write_bytes((root / one).read_bytes())
        write_graph(root / file, "a", "b")
    (root / one).unlink()
    report = own.prepare(root, tmp_path / "out")
    assert not report.faults and report.kept["train"] == 3 == len(folder_source(root, 24))


def test_a_set_that_comes_to_nothing_leaves_its_report_and_the_same_command_goes_over_it(tmp_path, capsys):
    root, out = tmp_path / "mine", tmp_path / "out"
    (name,) = draw(root, 1)
    argv = ["folder", "--root", str(root), "--out", str(out)]
    assert main(argv) == 2
    assert "p0.png: cannot be read" in capsys.readouterr().err and "p0.png" in (out / "report.json").read_text()
    write_graph((root / name).with_suffix(".json"), "a", "b")
    assert main(argv) == 0 and main(argv) == 2, "now a set is there"
    assert main(["folder", "--root", str(root), "--out", str(root)]) == 2
    assert "is --root itself; give another folder" in capsys.readouterr().err
