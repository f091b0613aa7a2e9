"""`prepare coco`: sg2im's filters one by one, masks that cost themselves only, every fault named, the id lists."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from support.small_sets import dump, lines

from sgg_fast.config import ConfigError
from sgg_fast.data import jsonl
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.coco import CocoFilters, prepare
from sgg_fast.data.sources import jsonl_source

FEW = CocoFilters(num_val=1, num_test=2)
W, H = 100, 80


def square(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


class CocoSet:
    """The four annotation files and two lists; dictionaries to fill, then `write`."""

    def __init__(self) -> None:
        things = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
        stuff = [{"id": 106, "name": "clouds"}, {"id": 183, "name": "other"}]
        self.files = {
            f"{kind}_{split}2017": {"info": {"year": 2017, "nested": {"a": [1]}}, "licenses": [], "images": [],
                                    "annotations": [], "categories": list(things if kind == "instances" else stuff)}
            for split in ("train", "val") for kind in ("instances", "stuff")
        }  # fmt: skip
        self.lists: dict[str, list[Any]] = {"train": [], "val": []}

    def image(self, split: str, image_id: int, name: str | None = None) -> None:
        record = {"id": image_id, "file_name": name or f"{image_id:012d}.jpg", "width": W, "height": H}
        self.files[f"instances_{split}2017"]["images"].append(record)
        self.files[f"stuff_{split}2017"]["images"].append(record)
        self.lists[split].append(image_id)

    def annotate(self, split: str, image_id: int, category: int, box: list[float], segmentation: Any = None) -> dict:
        rows = self.files[f"{'stuff' if category > 91 else 'instances'}_{split}2017"]["annotations"]
        rows.append({"id": 1000 + len(rows), "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0,
                     "segmentation": square(*box) if segmentation is None else segmentation})  # fmt: skip
        return rows[-1]

    def good(self, split: str, image_id: int, num_things: int = 2) -> None:
        """Passes every filter with one stuff and 2 .. 7 things."""
        self.image(split, image_id)
        for k in range(num_things):
            self.annotate(split, image_id, (1, 3)[k % 2], [5 * k, 10, 20, 30])
        self.annotate(split, image_id, 106, [0, 0, W, 20])

    def write(self, root: Path, lists: bool = True) -> Path:
        for name, content in self.files.items():
            dump(root / "annotations" / f"{name}.json", content)
        for split, ids in self.lists.items() if lists else ():
            path = root / "deprecated-challenge2017" / f"{split}-ids.txt"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text("".join(f"{i}\n" for i in ids))
        return root


def plain() -> CocoSet:
    coco = CocoSet()
    for image_id in (5, 2, 9):
        coco.good("train", image_id)
    for image_id in (30, 31, 32, 33):
        coco.good("val", image_id)
    return coco


def test_the_set_is_what_the_files_say(tmp_path):
    coco = plain()
    report = prepare(coco.write(tmp_path / "root"), tmp_path / "out", FEW)
    assert [line["id"] for line in lines(tmp_path / "out")] == [5, 2, 9], "in the file's order"
    assert lines(tmp_path / "out")[0] == {
        "id": 5, "image": "train2017/000000000005.jpg", "size": [W, H], "objects": ["person", "car", "clouds"],
        "boxes": [[0, 10, 20, 30], [5, 10, 20, 30], [0, 0, 100, 20]],
        "centres": [[0.1, 25 / 80], [0.15, 25 / 80], [0.5, 0.125]],
    }  # fmt: skip
    assert [line["id"] for line in lines(tmp_path / "out", "val")] == [30], "val is the first"
    assert [line["id"] for line in lines(tmp_path / "out", "test")] == [32, 33], "test the last"
    assert report.dropped["val"] == {"taken for test": [32, 33], "between val and test": [31]}
    table = report.table()
    assert all(number in table for number in ("24972", "1024", "2048"))
    source = jsonl_source(tmp_path / "out", 32, draws=2, check=False)
    assert len(source) == 6 and source.draws == 2 and source.graphs[0].objects == ("person", "car", "clouds")
    assert {p for g in source.graphs for _, p, _ in g.relations} <= {"left of", "right of", "above", "below", "inside",
                                                                     "surrounding"}  # fmt: skip


def test_each_filter_is_counted_once(tmp_path):
    coco = plain()
    coco.image("train", 10)  # no stuff
    coco.annotate("train", 10, 1, [0, 0, 50, 50])
    coco.good("train", 11, num_things=1)  # two objects
    coco.good("train", 12, num_things=8)  # nine
    coco.good("train", 13)
    coco.annotate("train", 13, 1, [0, 0, 16, 10])  # exactly 2 % of 100 x 80
    coco.annotate("train", 13, 183, [0, 0, 90, 70])  # "other"
    coco.good("train", 14)
    coco.lists["train"].remove(14)  # not of the challenge
    coco.lists["train"] += [777, 5]
    report = prepare(coco.write(tmp_path / "root"), tmp_path / "out", FEW)
    assert report.dropped["train"] == {
        "no record of the image": [777], "listed twice": [5], "no stuff annotation": [10],
        "fewer than 3 objects": [11], "more than 8 objects": [12],
    }  # fmt: skip
    assert report.parts["objects"] == {"box of at most 0.02 of the image": 1, 'category "other"': 1}
    assert [line["id"] for line in lines(tmp_path / "out")] == [5, 2, 9, 13]
    assert report.listed["train"] == 9 == report.kept["train"] + sum(map(len, report.dropped["train"].values()))
    assert not report.faults


def test_each_fault_is_named_and_left_out(tmp_path):
    coco, said = plain(), {}
    nan = float("nan")
    faults = {
        "box with a coordinate that is not finite": {"bbox": [nan, 0, 50, 50]},
        "box that is not four numbers": {"bbox": [0, 0, 50]},
        "box outside the image": {"bbox": [100, 0, 50, 50]},
        "category that the file does not describe": {"category_id": 55},
        "annotation id occurs again": {"id": 1000},
        "annotation without a usable id": {"id": "x"},
        "annotation without a usable category_id: it is text in quotes, and ids are numbers": {"category_id": "1"},
    }
    for image_id, (reason, change) in enumerate(faults.items(), start=50):
        coco.good("train", image_id)
        row = coco.annotate("train", image_id, 1, [0, 0, 50, 50])
        row.update(change)
        said["instances_train2017.json", reason] = [f"image {image_id}, annotation {row['id']!r}"]
    coco.annotate("train", 5, 3, [-5, 0, 50, 50], square(0, 0, 45, 50))  # over the edge: kept as it is
    report = prepare(coco.write(tmp_path / "root"), tmp_path / "out", FEW)
    found = {(fault["file"], fault["reason"]): fault["where"] for fault in report.document()["faults"]}
    assert found == said
    assert report.parts["objects"] == {f"fault: {reason}": 1 for reason in faults}
    assert [len(line["objects"]) for line in lines(tmp_path / "out")] == [4, 3, 3] + [3] * len(faults)
    assert lines(tmp_path / "out")[0]["boxes"][2] == [-5, 0, 50, 50]
    assert report.notes == {"boxes_kept_that_reach_over_the_edge": 1}


def test_a_mask_that_cannot_be_read_costs_itself_only(tmp_path):
    """As in sg2im, whose images are chosen by boxes and names: the object stays, and the box's middle is taken."""
    coco, said = plain(), {}
    rle = coco_mask.encode(np.asfortranarray(np.ones((H, W), np.uint8)))
    full = {"size": [H, W], "counts": rle["counts"].decode()}
    nan = float("nan")
    faults = {
        "polygon with a coordinate that is not finite": [[0, nan, 9, 9, 0, 9]],
        "polygon that leaves the image": [[0, 0, 10**9, 9, 0, 9]],
        "polygon of fewer than three points": [[0, 0, 9, 9]],
        "mask of another size than the image": {**full, "size": [W, H]},
        "mask without run lengths": {"size": [H, W], "counts": [1.5]},
        "mask whose run lengths do not fill the image": {**full, "counts": full["counts"][:-1] + "1"},
        "mask whose run lengths are not in COCO's form": {**full, "counts": "\udcff\u00e9"},
    }
    for image_id, (reason, segmentation) in enumerate(faults.items(), start=50):
        coco.good("train", image_id)
        row = coco.annotate("train", image_id, 1, [0, 0, 50, 40], segmentation)
        said["instances_train2017.json", f"{reason}; its box is used"] = [f"image {image_id}, annotation {row['id']}"]
    for image_id, segmentation in ((80, []), (81, None)):
        coco.good("train", image_id)
        coco.annotate("train", image_id, 1, [0, 0, 50, 40], []).update(segmentation=segmentation)
    coco.good("train", 82)
    row = coco.annotate("train", 82, 1, [0, 0, 50, 40], [[0, 0, 9, 9], *square(10, 10, 20, 20)])
    one = "polygon of fewer than three points; the object's other polygons are used"
    said["instances_train2017.json", one] = [f"image 82, annotation {row['id']}"]
    report = prepare(coco.write(tmp_path / "root"), tmp_path / "out", FEW)
    assert {(fault["file"], fault["reason"]): fault["where"] for fault in report.document()["faults"]} == said
    rows = lines(tmp_path / "out")[3:]
    assert [len(line["objects"]) for line in rows] == [4] * (len(faults) + 3), "no image changes its split"
    assert [line["centres"][2] for line in rows] == [[0.25, 0.25]] * (len(faults) + 2) + [[0.2, 0.25]]
    assert report.notes["objects_without_a_mask_whose_box_is_used"] == 2 and not report.parts["objects"]


def test_boxes_alone_make_a_set_and_ids_as_text_or_with_a_point_are_named(tmp_path, capsys):
    """What Label Studio and CVAT write, and what pandas makes of ids."""
    coco = plain()
    for name, content in coco.files.items():
        for row in content["annotations"]:
            row["segmentation"] = [] if "instances" in name else row["segmentation"]
    root, out = coco.write(tmp_path / "root"), tmp_path / "out"
    argv = ["coco", "--root", str(root), "--out", str(out), "--num-val", "1", "--num-test", "1"]
    assert main(argv) == 0 and len(lines(out)) == 3
    for kind, said in ((str, "it is text in quotes"), (float, "it is written with a decimal point")):
        for row in coco.files["instances_train2017"]["annotations"]:
            row["image_id"] = kind(row["image_id"])
        coco.write(root)
        assert main([*argv, "--overwrite"]) == 2
        err = capsys.readouterr().err
        assert said in err and "3 fewer than 3 objects" in err and "refused.json" in err, err
        assert said in (out / "refused.json").read_text() and len(lines(out)) == 3, "the earlier set stays"


def test_what_is_written_can_be_read(tmp_path):
    """Objects and relations beyond what one graph may hold are left out by the writer, not refused by the reader."""
    coco = plain()
    coco.image("train", 70)
    for k in range(2100):
        coco.annotate("train", 70, 1, [k % 40, 10, 20, 30])
    coco.annotate("train", 70, 106, [0, 0, W, 20])
    filters = dataclasses.replace(FEW, max_objects=5000)
    report = prepare(coco.write(tmp_path / "root"), tmp_path / "out", filters)
    assert report.dropped["train"] == {"no graph can be made of it": [70]}
    assert len(jsonl_source(tmp_path / "out", 32, draws=2, check=False)) == 6


def test_lists_with_a_byte_order_mark_are_read(tmp_path):
    coco = plain()
    root = coco.write(tmp_path / "root")
    for path in root.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    prepare(root, tmp_path / "out", FEW)
    assert [line["id"] for line in lines(tmp_path / "out")] == [5, 2, 9]
    for name in ("set.json", "train.jsonl"):  # as an editor would save them
        (tmp_path / "out" / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / "out" / name).read_bytes())
    with pytest.raises(ConfigError, match=r"train\.jsonl: its bytes are not those"):
        jsonl_source(tmp_path / "out", 32, check=False)
    header = json.loads((tmp_path / "out" / "set.json").read_text(encoding="utf-8-sig"))
    kept = {key: value for key, value in header.items() if key not in ("files", "sha256")}  # the cure it names
    (tmp_path / "out" / "set.json").write_text(json.dumps(kept), encoding="utf-8-sig")
    assert len(jsonl_source(tmp_path / "out", 32, check=False)) == 3


def test_a_folder_of_pictures_that_is_not_there_is_refused_before_anything_is_read(tmp_path, capsys):
    argv = ["coco", "--root", str(plain().write(tmp_path / "root")), "--out", str(tmp_path / "out")]
    assert main([*argv, "--images", str(tmp_path / "none")]) == 2
    assert "--images" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "out" / "images").mkdir(parents=True)
    assert main([*argv, "--images", str(tmp_path)]) == 2
    assert "images is there already; move it away or leave --images out" in capsys.readouterr().err
    assert main(argv) == 0


def test_faulty_images_and_categories_are_named_and_left_out(tmp_path):
    coco = plain()
    for image_id, change in ((60, {"width": 0}), (61, {"file_name": "../61.jpg"}), (62, {"file_name": "/etc/62.jpg"}),
                             (63, {"file_name": "\udcff.jpg"}), (64, {"file_name": None})):  # fmt: skip
        coco.good("train", image_id)
        coco.files["instances_train2017"]["images"][-1].update(change)
    images = coco.files["instances_train2017"]["images"]
    images += [dict(images[0], file_name="again.jpg"), {"id": -1}, "x"]
    coco.files["stuff_train2017"]["categories"] += [{"id": 107, "name": "\udcff"}, {"id": 106, "name": "again"},
                                                    {"id": 108, "name": " "}]  # fmt: skip
    report = prepare(coco.write(tmp_path / "root"), tmp_path / "out", FEW)
    found = {(fault["file"], fault["reason"]): fault["where"] for fault in report.document()["faults"]}
    things, stuff = "instances_train2017.json", "stuff_train2017.json"
    leaves = "image path that is absolute or leaves its folder"
    assert found == {
        (things, "no usable width and height"): ["image 60"],
        (things, leaves): ["image 61", "image 62"],
        (things, "file_name is not UTF-8"): ["image 63"],
        (things, "file_name is not text"): ["image 64"],
        (things, "image id occurs again"): ["image 5"],
        (things, "image without a usable id"): ["image without id", "image without id"],
        (stuff, "category name is not UTF-8"): ["category 107"],
        (stuff, "category id occurs again"): ["category 106"],
        (stuff, "category name that no graph can have: empty, reserved, too long or with control characters"): [
            "category 108"
        ],
    }
    assert report.dropped["train"] == {"faulty record of the image": [60, 61, 62, 63, 64]}
    assert lines(tmp_path / "out")[0]["image"] == "train2017/000000000005.jpg"


def test_without_the_lists_the_number_that_would_come_out_is_said(tmp_path, capsys):
    coco = plain()
    coco.lists["train"] = [5]
    root, out = coco.write(tmp_path / "root", lists=False), tmp_path / "out"
    argv = ["coco", "--root", str(root), "--out", str(out), "--num-val", "1", "--num-test", "1"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "72623 training images come out in place of the 24972" in err and "--all-images" in err and not out.exists()
    assert main([*argv, "--all-images"]) == 0
    assert [line["id"] for line in lines(out)] == [5, 2, 9]
    assert main(argv[:5]) == 2, "still no lists"
    coco.write(root)
    assert main(argv) == 2 and "already holds a set; --overwrite" in capsys.readouterr().err
    first = (out / "train.jsonl").read_bytes()
    assert main([*argv, "--overwrite"]) == 0
    assert [line["id"] for line in lines(out)] == [5] and first.startswith((out / "train.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda root: (root / "annotations" / "stuff_val2017.json").unlink(),
            "stuff_val2017.json missing, there or in",
        ),
        (
            lambda root: (root / "deprecated-challenge2017" / "val-ids.txt").write_text("5\nx\n"),
            "line 2: not an image id",
        ),
        (lambda root: dump(root / "annotations" / "stuff_train2017.json", {"images": []}), "no usable category; is it"),
        (lambda root: dump(root / "annotations" / "stuff_train2017.json", []), "must be an object of lists"),
        (lambda root: (root / "deprecated-challenge2017" / "train-ids.txt").write_text(""), "no training image passes"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_2(tmp_path, capsys, change, reason):
    root = plain().write(tmp_path / "root")
    change(root)
    assert main(["coco", "--root", str(root), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("prepare:")]
    assert len(said) == 1 and reason in said[0] and out == "" and not jsonl.is_set(tmp_path / "out")


def test_bad_settings_are_refused(tmp_path, capsys):
    paths = ["coco", "--root", str(tmp_path), "--out", str(tmp_path)]
    for flags in (["--min-object-share", "1.5"], ["--min-objects", "9"], ["--num-val", "-1"]):
        assert main([*paths, *flags]) == 2 and flags[0] in capsys.readouterr().err
