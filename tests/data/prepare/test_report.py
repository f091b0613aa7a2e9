"""Reports of preparations: the numbers add up, in JSON, in the table and in the one line of a refusal."""

from __future__ import annotations

import json

from sgg_fast.data.prepare.report import MAX_LISTED, Report


def filled() -> Report:
    report = Report({"root": "here"}, {"train": 50, "val": None})
    report.listed.update(train=4, val=1)
    report.kept.update(train=1, val=1)
    for image in (3, 8):
        report.drop_image("train", image, "too small")
    report.drop_image("train", 9, "no objects")
    report.read_parts["objects"] = 10
    for reason in ("no name", "no name", "no box"):
        report.drop("objects", reason)
    for image in (5, 6, 7, 8):
        report.fault("objects.json", f"image {image}", "box\udcff")
    report.notes["boxes_kept"] = 2
    report.warnings.append("are these the files?")
    return report


TABLE = """\
images                train   val
listed in the splits      4     1
- too small               2     0
- no objects              1     0
kept                      1     1
the paper's count        50  None

objects read  10
- no name      2
- no box       1
kept           7

boxes kept  2

fault in objects.json: box\udcff: 4 (image 5, image 6, image 7, ...)
WARNING: are these the files?"""


def test_the_table_holds_every_number():
    assert filled().table() == TABLE
    nothing = Report({}, {"train": None}).table().splitlines()
    assert [line.split()[-1] for line in nothing] == ["train", "0", "0"]


def test_the_document_is_the_tables_numbers_and_every_place():
    document = json.loads(filled().text())
    assert filled().text().isascii() and document == filled().document()
    assert document["images"]["train"] == {
        "listed": 4, "kept": 1, "paper": 50, "dropped": {"too small": 2, "no objects": 1},
    }  # fmt: skip
    assert document["objects"] == {"read": 10, "kept": 7, "dropped": {"no name": 2, "no box": 1}}
    assert document["dropped_images"] == {"train": {"too small": [3, 8], "no objects": [9]}, "val": {}}
    (fault,) = document["faults"]
    assert fault["count"] == 4 and fault["where"] == ["image 5", "image 6", "image 7", "image 8"]


def test_one_line_says_why_down_to_the_first_place():
    said = "2 too small; 1 no objects; of 10 objects left out: 2 no name, 1 no box; image 5: box\udcff"
    assert filled().why() == said
    assert filled().why("val").startswith("none is listed; of 10 objects")


def test_places_beyond_the_most_are_only_counted():
    report = Report({}, {"train": None})
    for k in range(MAX_LISTED + 5):
        report.fault("a.json", f"record {k}", "bad")
    (fault,) = report.document()["faults"]
    assert fault["count"] == MAX_LISTED + 5 and fault["where"][-1] == f"record {MAX_LISTED - 1}"


def test_vocabularies_that_differ_name_the_first_names():
    report, same = filled(), {"same": True, "missing": [], "extra": [], "reordered": False}
    other = {"same": False, "missing": [f"n{k}" for k in range(9)], "extra": [], "reordered": True}
    report.vocabulary |= {"names": {"objects": 3, "predicates": 2}, "compared_with": "vocab.json",
                          "compared": {"object": other, "pred": same}}  # fmt: skip
    lines = report.table().splitlines()
    missing = ", ".join(f"'n{k}'" for k in range(8))
    assert "vocabulary: 3 objects, 2 predicates" in lines and "pred: as in vocab.json" in lines
    assert f"object: differ from vocab.json: missing {missing}, ... (9); extra none; another order" in lines
