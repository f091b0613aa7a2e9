"""Alias files, the order of names, the comparison with a published vocabulary, the signs of an earlier version."""

from __future__ import annotations

import json

import pytest
from support.vg_files import LOW, VgSet, plain_set

from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.report import Report
from sgg_fast.data.prepare.vg import prepare
from sgg_fast.data.prepare.vocabulary import read_aliases


def test_vocabulary_is_in_sg2ims_order_and_compared(tmp_path):
    vg = plain_set(2)
    vg.add("train", 3, ("man", "man", "tree"), ((0, "above", 1), (0, "on", 1)), {0: ["tall", "red"]})
    root = vg.write(tmp_path / "root")
    prepare(root, tmp_path / "out", LOW)
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert vocabulary["object_idx_to_name"] == ["__image__", "man", "tree", "sky"]
    assert vocabulary["pred_idx_to_name"] == ["__in_image__", "on", "above"]
    assert vocabulary["attribute_idx_to_name"] == ["tall", "green"]
    assert vocabulary["object_name_to_idx"] == {"__image__": 0, "man": 1, "tree": 2, "sky": 3}

    published = {**vocabulary, "object_idx_to_name": ["__image__", "tree", "man", "boat"]}
    (root / "vocab.json").write_text(json.dumps(published))
    report = prepare(root, tmp_path / "again", LOW)
    assert report.vocabulary["compared"]["object"] == {
        "same": False, "missing": ["boat"], "extra": ["sky"], "reordered": True,
    }  # fmt: skip
    assert report.vocabulary["compared"]["pred"]["same"]
    assert "missing 'boat'; extra 'sky'; another order" in report.table()


@pytest.mark.parametrize("file", ["objects", "relationships"])
def test_an_earlier_version_is_recognised_by_its_fields(tmp_path, file):
    vg = plain_set()
    old = json.loads(json.dumps(getattr(vg, file)).replace('"merged_object_ids": [], ', ""))
    setattr(vg, file, old)
    root = vg.write(tmp_path / "root")
    with pytest.raises(PrepareError, match=rf"^{file}\.json is not Visual Genome 1\.4 .*; get version 1\.4 "):
        prepare(root, tmp_path / "out", LOW)
    report = prepare(root, tmp_path / "out", LOW, any_version=True)
    assert len(report.warnings) == 1 and "WARNING" in report.table()


def many_names(num_objects: int, num_predicates: int) -> VgSet:
    """As many names as asked pass sg2im's own thresholds, by names repeated within few images."""
    vg = VgSet()
    vg.add("train", 1, ["man"] * 2 + ["tree"], [])
    names = [f"n{k}" for k in range(num_objects)]
    first = vg.objects[0]["objects"]
    first += [{**first[0], "object_id": 1000 + k, "names": names} for k in range(2000)]
    row = {end: {"object_id": 1000 + k, "merged_object_ids": []} for k, end in enumerate(("subject", "object"))}
    vg.relationships[0]["relationships"] = [
        {**row, "relationship_id": k, "predicate": f"p{p}"} for p in range(num_predicates) for k in range(500)
    ]
    return vg


@pytest.mark.parametrize(("sizes", "refused"), [((259, 3), True), ((5, 66), True), ((5, 3), False)])
def test_an_earlier_version_is_recognised_by_its_names(tmp_path, sizes, refused):
    root = many_names(*sizes).write(tmp_path / "root")
    said = "the sign of Visual Genome 1.2" if refused else "no training image passes the filters: 1 more than 30 obj"
    with pytest.raises(PrepareError, match=said):
        prepare(root, tmp_path / "out")


def test_a_line_separator_in_an_alias_is_no_end_of_line_and_a_byte_order_mark_no_letter(tmp_path):
    path = tmp_path / "alias.txt"
    path.write_bytes("\ufeffman,me\u2028n,guy\r\ntree,trees\n".encode())
    aliases = read_aliases(path, False, Report({}, {"train": None}))
    assert aliases == {"man": "man", "me\u2028n": "man", "guy": "man", "tree": "tree", "trees": "tree"}
