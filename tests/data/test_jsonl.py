"""Prepared sets: what is written is read; lines that no reader can use, and changed files, are refused with a cure."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sgg_fast.config import ConfigError
from sgg_fast.data.jsonl import (
    AGAIN,
    MARK,
    check_link,
    fault_of,
    files_of,
    is_set,
    link_images,
    read_header,
    read_lines,
    write_set,
)
from sgg_fast.graph import SceneGraph

PLAIN: dict[str, Any] = {"id": 7, "image": "a/7.jpg", "objects": ["sky", "sheep"], "relationships": [[0, "above", 1]],
                         "boxes": [[0, 0, 64, 20], [20, 30, 10, 9]]}  # fmt: skip
BARE = {key: value for key, value in PLAIN.items() if key != "boxes"}
DERIVED = {**{key: value for key, value in PLAIN.items() if key != "relationships"}, "size": [64, 48],
           "centres": [[0.5, 0.2], [0.4, 0.7]]}  # fmt: skip
HEADER = {"kind": "folder", "resize": "crop"}


def test_what_is_written_is_read_and_the_same_records_give_the_same_bytes(tmp_path):
    assert files_of(["train", "val"]) == ["train.jsonl", "val.jsonl", "report.json", "set.json"]
    for name in ("one", "two"):
        write_set(tmp_path / name, HEADER, {"train": iter([PLAIN, BARE]), "val": []}, lambda: "{}")
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(files_of(["train", "val"]))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and is_set(tmp_path / "one") and not is_set(tmp_path)
    header = read_header(tmp_path / "one")
    assert header["images"] == {"train": 2, "val": 0} and HEADER.items() <= header.items()
    boxed, bare = read_lines(tmp_path / "one" / "train.jsonl", draws=2)
    graph = SceneGraph(("sky", "sheep"), ((0, "above", 1),))
    assert boxed.image == "a/7.jpg" and boxed.graphs == bare.graphs == (graph, graph)
    assert np.array_equal(boxed.boxes, PLAIN["boxes"]) and bare.boxes is None
    assert list(read_lines(tmp_path / "one" / "val.jsonl")) == []


def test_relations_are_drawn_from_boxes_by_the_images_id(tmp_path):
    write_set(tmp_path, HEADER, {"train": [DERIVED, {**DERIVED, "id": 8}]}, lambda: "{}")
    lines = list(read_lines(tmp_path / "train.jsonl", draws=20))
    true = {(0, "above", 1), (1, "below", 0)}
    assert all(len(line.graphs) == 20 for line in lines)
    assert all(len(graph.relations) > 0 and set(graph.relations) <= true for line in lines for graph in line.graphs)
    assert len(set(lines[0].graphs)) > 1, "draws differ"
    assert lines[0].graphs != lines[1].graphs, "images differ"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**PLAIN, "image": "../7.jpg"}, "image path '../7.jpg' is absent or leaves the folder of the images"),
        ({**PLAIN, "image": None}, "image path None is absent"),
        ({**PLAIN, "relationships": [[0, "above", 5]]}, "relationships[0]: object index 5, but the graph has 2"),
        ({**PLAIN, "boxes": [[0, 0, 64, 20]]}, "1 boxes for 2 objects"),
        ({**PLAIN, "boxes": [[0, 0, 64]] * 2}, "lists of 4 numbers expected"),
        ({**PLAIN, "boxes": [[0, 0, 64, True]] * 2}, "lists of 4 numbers expected"),
        ({**PLAIN, "boxes": None}, "lists of 4 numbers expected"),
        ({**PLAIN, "boxes": [[0, 0, 10**400, 20]] * 2}, "a number is too large"),
        ({**PLAIN, "boxes": [[0, 0, float("inf"), 20]] * 2}, "a number is not finite"),
        ({**DERIVED, "centres": [[0.5, 0.2]]}, "boxes, centres and size do not fit the objects"),
        ({**DERIVED, "size": [64, 0]}, "boxes, centres and size do not fit the objects"),
        ({**DERIVED, "id": "7"}, "no id, which relations are drawn from"),
    ],
)
def test_the_writer_knows_what_the_reader_refuses(tmp_path, record, reason):
    assert fault_of(PLAIN) == fault_of(BARE) == fault_of(DERIVED) == "" and fault_of(record).startswith(reason)
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n\n{json.dumps(record)}\n")
    lines = read_lines(path)
    assert next(lines).image == "a/7.jpg"
    with pytest.raises(ConfigError) as caught:
        next(lines)
    assert str(caught.value).startswith(f"{path}: line 3: {reason}") and str(caught.value).endswith(AGAIN)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"{\n", "not usable JSON near line 1"),
        (b'{"image": "\xff"}\n', "not usable JSON near line"),
        (b"[]\n", "line 1: image path None"),
        (b"[" * 100_000, "not usable JSON near line 1"),
    ],
)
def test_a_file_that_holds_no_lines_is_refused(tmp_path, content, reason):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(read_lines(path))
    assert str(caught.value).startswith(f"{path}: {reason}") and str(caught.value).endswith(AGAIN)


@pytest.mark.parametrize("file", ["train.jsonl", MARK])
def test_a_change_is_noticed_and_goes_on_if_it_was_made_on_purpose(tmp_path, file):
    write_set(tmp_path, HEADER, {"train": [PLAIN], "val": [BARE]}, lambda: "{}")
    changed = (tmp_path / file).read_text().replace("sheep", "goats").replace("folder", "my own")
    (tmp_path / file).write_text(changed)
    with pytest.raises(ConfigError, match=r"its bytes are not those .* if you changed it on purpose, delete \"files\""):
        read_header(tmp_path)
    assert file == MARK or read_header(tmp_path, "val"), "the other split is as it was"
    header = json.loads((tmp_path / MARK).read_text())
    cured = {key: value for key, value in header.items() if key not in ("files", "sha256")}
    (tmp_path / MARK).write_text(json.dumps(cured))
    assert read_header(tmp_path) == cured


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "sgg_fast set 1", "resize": "stretch"}', "[" * 100_000])
def test_what_is_no_header_says_to_prepare_again(tmp_path, text):
    (tmp_path / MARK).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_header(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / MARK}: ") and str(caught.value).endswith(AGAIN)


def test_the_link_to_the_pictures_replaces_a_link_and_nothing_else(tmp_path):
    out, old, new = (tmp_path / name for name in ("out", "old", "new"))
    for folder in (out, old, new):
        folder.mkdir()
    for images in (None, old, new, out / "images"):
        check_link(out, images)
        link_images(out, images)
    assert (out / "images").is_symlink() and (out / "images").resolve() == new
    with pytest.raises(ConfigError, match="there is no such folder"):
        check_link(out, tmp_path / "none")
    (out / "images").unlink()
    (out / "images").mkdir()
    with pytest.raises(ConfigError, match="is there already; move it away or leave --images out"):
        check_link(out, new)
    check_link(out, out / "images")
