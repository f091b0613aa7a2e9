"""`prepare laion-sg`: what is kept is what the files say; every fault is named and left out."""

from __future__ import annotations

from typing import Any

from PIL import Image
from support.small_sets import dump, faults, lines

from sgg_fast.data.prepare import laion
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.sources import jsonl_source


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
