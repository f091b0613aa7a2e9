"""Annotation files read record by record; ids, names and boxes that pass, and why others do not."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from sgg_fast.data.prepare.records import (
    FaultError,
    PrepareError,
    checked_box,
    checked_id,
    checked_name,
    checked_text,
    is_id,
    is_name,
    place,
    read_json,
    stream,
    stream_lists,
)


def test_streaming_holds_one_record_not_the_file(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"image_id": i, "objects": ["x" * 1000]} for i in range(16_000)]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream(path)) == 16_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 15e6 and peak < 8e6


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_records_are_the_same_whatever_is_read_at_a_time(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("sgg_fast.data.prepare.records.CHUNK", chunk)
    records = [{"a": [1, 2.5, None, 'é\\"]']}, 12345, "x, ]", [], -7]
    for indent in (None, 2):
        path = tmp_path / "list.json"
        path.write_text("\ufeff" + json.dumps(records, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        assert list(stream(path)) == records
    path.write_text(" [ ] ")
    assert list(stream(path)) == []
    path.write_text("[1, ]")
    with pytest.raises(PrepareError, match="not usable JSON: Expecting value at character"):
        list(stream(path))


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_lists_of_an_object_are_streamed_whatever_is_read_at_a_time(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("sgg_fast.data.prepare.records.CHUNK", chunk)
    path = tmp_path / "a.json"
    content = {
        "info": {"x": [1, {"y": "]}"}]},
        "images": [1, "a,b", [2]],
        "empty": [],
        "n": -1.5,
        "rows": [{"k": None}],
    }
    for indent in (None, 1):
        path.write_text("\ufeff" + json.dumps(content, indent=indent), encoding="utf-8")
        assert list(stream_lists(path)) == [("images", 1), ("images", "a,b"), ("images", [2]), ("rows", {"k": None})]
    for text, reason in (('{"a": [1,]}', "Expecting value"), ('{"a": [1], }', "a key"), ('{"a" 1}', "a key"),
                         ('{"a": [1', "the list ends early"), ('{"a": 1', "the object ends early"),
                         ("{} 1", "more text"), ('{1: 2}', "a key")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PrepareError, match=reason):
            list(stream_lists(path))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0, None),
        (2**31 - 1, None),
        (2**31, ""),
        (-1, ""),
        (True, ""),
        (None, ""),
        (" 7 ", ": it is text in quotes, and ids are numbers"),
        ("seven", ""),
        (7.0, ": it is written with a decimal point, and ids are whole numbers"),
        (7.5, ""),
    ],
)
def test_ids_are_whole_numbers_that_fit(value, reason):
    assert is_id(value) == (reason is None)
    if reason is None:
        assert checked_id({"id": value}, "id", "row") == value
        return
    for record in ({"id": value}, *([[], {}] if reason == "" else [])):
        with pytest.raises(FaultError, match=f"^row without a usable id{reason}$"):
            checked_id(record, "id", "row")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("red hat", None),
        (" Café ", None),
        (7, "name is not text"),
        ("a\udcff", "name is not UTF-8"),
        ("a\0", "name holds a zero byte"),
        (" ", "name that no graph can have"),
        ("__image__", "name that no graph can have"),
        ("x" * 201, "name that no graph can have"),
        ("a\x07", "name that no graph can have"),
    ],
)
def test_names_are_those_that_graphs_can_have(value, reason):
    if reason is None:
        assert is_name(value) and checked_name(value, "name") == value, "as it was written"
        return
    with pytest.raises(FaultError, match=f"^{reason}"):
        checked_name(value, "name")
    if "graph" in reason:
        assert not is_name(value) and checked_text(value, "text") == value


@pytest.mark.parametrize(
    ("box", "over", "reason"),
    [
        ((0, 0, 100, 80), False, None),
        ((-5, 0, 50, 50), True, None),
        ((60, 0, 40.5, 50), True, None),
        ((0, 31, 9, 50), True, None),
        ((100, 0, 5, 5), True, "box outside the image"),
        ((0, -5, 5, 5), True, "box outside the image"),
        ((0, 0, "9", 9), True, "box without a number for w"),
        ((True, 0, 9, 9), True, "box without a number for x"),
        ((0, 0, 9, float("inf")), True, "box with a coordinate that is not finite"),
        ((0, 2**31, 9, 9), True, "box with a coordinate that is too large"),
    ],
)
def test_boxes_are_numbers_and_touch_the_image(box, over, reason):
    record = dict(zip("xywh", box, strict=True))
    if reason is None:
        assert checked_box(record, 100, 80, outside=False) == (box, over)
        return
    with pytest.raises(FaultError, match=f"^{reason}$"):
        checked_box(record, 100, 80, outside=False)
    if "outside" in reason:
        assert checked_box(record, 100, 80, outside=True) == (box, over), "as in sg2im"


def test_small_files_and_places_in_words(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(PrepareError, match=rf"^{path}: there is no such file$"):
        read_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    for content in (b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(PrepareError, match=rf"^{path}: not usable JSON: "):
            read_json(path)
    assert place(7, "object", 3) == "image 7, object 3" and place("x") == "image 'x'"
