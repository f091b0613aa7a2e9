"""`prepare vg`: sg2im's filters on real annotations and on small sets; every fault named; what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from support import PUBLISHED
from support.tiny_runs import flags
from support.vg_files import LOW, SAMPLE, VgSet, draw_images, load_by_facts, plain_set, real, sample_root

import train
from sgg_fast.config import ConfigError
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.encode import Filters
from sgg_fast.data.prepare.records import PrepareError, stream
from sgg_fast.data.prepare.report import Report
from sgg_fast.data.prepare.vg import RESULT, prepare
from sgg_fast.data.prepare.vocabulary import read_aliases
from sgg_fast.data.sources import vg_source
from sgg_fast.data.vg_h5 import read_split, read_vocabulary

VOCABULARY = PUBLISHED / "vg_vocab.json"


def faults(report) -> dict[tuple[str, str], list[str]]:
    return {(fault["file"], fault["reason"]): fault["where"] for fault in report.document()["faults"]}


def sample_by_hand(least: int, size: int, splits: dict[str, list[int]]) -> dict[str, object]:
    """What sg2im's rules leave of the sample, from the raw JSON by plain loops."""
    raw = {path.stem: json.loads(path.read_text()) for path in SAMPLE.iterdir()}
    objects = {r["image_id"]: r["objects"] for r in raw["objects"]}
    relations = {r["image_id"]: r["relationships"] for r in raw["relationships"]}
    alias = {"trees": "tree", "windows": "window", "buildings": "building"}
    spoken = {"on top of": "on", "has a": "has"}
    count: Counter[str] = Counter()
    for i in splits["train"]:
        for o in objects[i]:
            for name in {alias.get(n, n) for n in o["names"]}:
                count[name] += 1
    names = {n for n, c in count.items() if c >= least}
    kept, why = {}, Counter()
    for i, found in objects.items():
        kept[i] = []
        for o in found:
            known = [alias.get(n, n) for n in o["names"] if alias.get(n, n) in names]
            if not known:
                why["name"] += 1
            elif o["w"] < size or o["h"] < size:
                why["size"] += 1
            else:
                kept[i].append((o["object_id"], known[0], [o["x"], o["y"], o["w"], o["h"]]))
    said: Counter[str] = Counter()

    def heard(i: int, predicate: str) -> str:
        low = predicate.lower().strip()
        return spoken.get(low, low) if i in splits["train"] else predicate

    def both(i: int, r: dict) -> bool:
        ids = [o[0] for o in kept[i]]
        return r["subject"]["object_id"] in ids and r["object"]["object_id"] in ids

    for i in splits["train"]:
        said.update([heard(i, r["predicate"]) for r in relations[i] if both(i, r)])
    predicates = {p for p, c in said.items() if c >= least}
    triples = {}
    for i, found in relations.items():
        triples[i] = []
        for r in found:
            if not both(i, r):
                why["end"] += 1
            elif heard(i, r["predicate"]) not in predicates:
                why["predicate"] += 1
            else:
                ids = [o[0] for o in kept[i]]
                ends = (ids.index(r["subject"]["object_id"]), ids.index(r["object"]["object_id"]))
                triples[i].append((r["relationship_id"], ends[0], heard(i, r["predicate"]), ends[1]))
    return {"kept": kept, "triples": triples, "why": why, "names": names, "predicates": predicates}


@real
@pytest.mark.parametrize(
    ("least", "train_ids", "val", "test", "kept_images"),
    [(2, [1, 3, 5], 2, 4, {"train": 3, "val": 1, "test": 0}), (1, [2, 4, 5], 1, 3, {"train": 2, "val": 1, "test": 1})],
)
def test_real_annotations_are_kept_and_dropped_as_plain_loops_explain(
    tmp_path, least, train_ids, val, test, kept_images
):
    splits = {"train": train_ids, "val": [val], "test": [test]}
    root = sample_root(tmp_path / "root", splits)
    filters = Filters(min_object_instances=least, min_attribute_instances=least, min_relation_instances=least)
    report = prepare(root, tmp_path / "out", filters, VOCABULARY, any_version=True)
    expected = sample_by_hand(least, 32, splits)
    kept, triples, why = expected["kept"], expected["triples"], expected["why"]

    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["objects"]["dropped"] == {
        f"name of fewer than {least} training instances": why["name"], "box side below 32 px": why["size"],
    }  # fmt: skip
    assert document["relations"]["dropped"] == {
        "subject or object left out": why["end"],
        f"predicate of fewer than {least} training relations": why["predicate"],
    }
    assert document["objects"]["kept"] == sum(map(len, kept.values())) > 50
    assert document["relations"]["kept"] == sum(map(len, triples.values())) > 15
    assert document["faults"] == [] and len(document["warnings"]) == 2
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    object_names, predicate_names = vocabulary["object_idx_to_name"], vocabulary["pred_idx_to_name"]
    assert (object_names[0], set(object_names[1:])) == ("__image__", expected["names"])
    assert (predicate_names[0], set(predicate_names[1:])) == ("__in_image__", expected["predicates"])
    assert vocabulary.keys() == json.loads(VOCABULARY.read_text()).keys()

    for split, ids in splits.items():
        passing = [i for i in ids if 3 <= len(kept[i]) <= 30 and 1 <= len(triples[i]) <= 30]
        images = load_by_facts(tmp_path / "out" / f"{split}.h5")
        assert [image["id"] for image in images] == passing
        assert document["images"][split]["kept"] == len(passing)
        assert document["images"][split]["listed"] == len(passing) + sum(document["images"][split]["dropped"].values())
        for image in images:
            objects = [(i, object_names[n], b) for i, n, b in
                       zip(image["ids"], image["names"], image["boxes"], strict=True)]  # fmt: skip
            assert objects == kept[image["id"]]
            relations = [(i, s, predicate_names[p], o) for i, s, p, o in image["relations"]]
            assert relations == triples[image["id"]]
    assert report.kept == kept_images, "the test is about images that pass and some that do not"


@real
def test_real_annotations_train(tmp_path):
    root, out = sample_root(tmp_path / "root", {"train": [1, 2, 3], "val": [4], "test": [5]}), tmp_path / "out"
    low = ["--min-object-instances", "2", "--min-relation-instances", "2", "--min-attribute-instances", "2"]
    assert main(["vg", "--root", str(root), "--out", str(out), "--any-version", *low]) == 0
    sizes = {
        "/".join(record["url"].split("/")[-2:]): (record["width"], record["height"])
        for record in json.loads((SAMPLE / "image_data.json").read_text())
    }
    draw_images(out / "images", sizes)
    source = vg_source(out, 64)
    assert len(source) == 3 and source.load_image(0).shape == (64, 64, 3)
    argv = ["--stage", "pretrain", "--data", str(out), "--out", str(tmp_path / "run"), *flags()]
    assert train.main(argv) == 0
    assert (tmp_path / "run" / "pretrain" / "graph_encoder").is_dir()


def filtered_set() -> VgSet:
    """`plain_set` and one more image or object for each filter of `LOW`."""
    vg = plain_set()
    three, relation = ("man", "tree", "sky"), ((0, "on", 1),)
    vg.add("train", 10, three, relation, size=(199, 400))
    vg.add("train", 11, ("man", "tree"), relation)
    vg.add("train", 12, (*three, "man", "tree"), relation)
    vg.add("train", 13, three)
    vg.add("train", 14, three, (*relation, (1, "on", 0), (2, "above", 0)))
    vg.add("train", 15, (*three, "unicorn"), ((0, "on", 1), (3, "on", 1)))  # a name seen once
    vg.add("train", 16, (*three, "tree"), ((0, "on", 1), (0, "devouring", 1)))  # a predicate seen once
    vg.object(16, 3)["h"] = 31
    vg.add("train", 17, three, relation)
    vg.objects = [r for r in vg.objects if r["image_id"] != 17]
    vg.add("train", 18, three, relation)
    vg.relationships = [r for r in vg.relationships if r["image_id"] != 18]
    vg.splits["train"] += [999, 1]
    vg.splits["val"] += [2, "x"]
    return vg


def test_each_filter_is_counted_once(tmp_path):
    report = prepare(filtered_set().write(tmp_path / "root"), tmp_path / "out", LOW)
    assert report.dropped["train"] == {
        "a side below 200 px": [10],
        "no record in image_data.json": [999],
        "listed twice in the splits": [1],
        "fewer than 3 objects": [11],
        "more than 4 objects": [12],
        "fewer than 1 relations": [13],
        "more than 2 relations": [14],
        "no record in objects.json": [17],
        "no record in relationships.json": [18],
    }
    assert report.dropped["val"] == {"listed twice in the splits": [2], "not an image id": ["'x'"]}
    assert report.parts["objects"] == {"name of fewer than 2 training instances": 1, "box side below 32 px": 1}
    assert report.parts["relations"] == {
        "subject or object left out": 2, "predicate of fewer than 2 training relations": 1,
    }  # fmt: skip
    assert [image["id"] for image in load_by_facts(tmp_path / "out" / "train.h5")] == [1, 2, 3, 4, 15, 16]
    assert report.listed == {"train": 15, "val": 3, "test": 1}
    for words in ("62565", "5062", "5096", "a side below 200 px", "3 objects, 2 predicates, 2 attributes"):
        assert words in report.table()


def test_aliases_and_spelling_as_in_sg2im(tmp_path):
    vg = plain_set(2)
    vg.add("train", 5, ("guy", "tree", "sky"), ((0, " ON TOP ", 1), (0, "Stands On", 1)))
    vg.add("val", 92, ("men", "tree", "sky"), ((0, "ON", 1), (0, "on", 1)))
    vg.add("val", 93, ("Man", "tree", "sky"), ((0, "stands on", 1),))
    root = vg.write(tmp_path / "root")
    report = prepare(root, tmp_path / "sg2im", LOW)
    # "ON TOP" in the alias file is never met: the predicate is lower-cased first and the file is not.
    (last,) = [image for image in load_by_facts(tmp_path / "sg2im" / "train.h5") if image["id"] == 5]
    assert [row[2] for row in last["relations"]] == [1]
    assert [image["id"] for image in load_by_facts(tmp_path / "sg2im" / "val.h5")] == [90, 92]
    assert report.notes["relations_of_val_and_test_lost_to_spelling_that_--names_clean_keeps"] == 1

    clean = Filters(**{**vars(LOW), "names": "clean"})
    report = prepare(root, tmp_path / "clean", clean)
    (last,) = [image for image in load_by_facts(tmp_path / "clean" / "train.h5") if image["id"] == 5]
    assert [row[2] for row in last["relations"]] == [1, 1]
    assert [image["id"] for image in load_by_facts(tmp_path / "clean" / "val.h5")] == [90, 92, 93]


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


def test_attributes_of_an_object_are_cut_at_the_most(tmp_path):
    vg = plain_set(3)
    vg.attributes[0]["attributes"][0]["attributes"] = ["tall", "green", "tall"]
    filters = Filters(**{**vars(LOW), "max_attributes": 2})
    prepare(vg.write(tmp_path / "root"), tmp_path / "out", filters)
    first = load_by_facts(tmp_path / "out" / "train.h5")[0]
    assert first["attributes"] == [[0, 1], [1, 0], []]


TEXT = ": it is text in quotes, and ids are numbers"


def bad_objects(vg: VgSet) -> dict[tuple[str, str], list[str]]:
    """Spoil the fourth object of an image a fault; what the report must say."""
    changes = {
        "box with a coordinate that is not finite": {"x": float("nan")},
        "box without a number for w": {"w": "40"},
        "box with a coordinate that is too large": {"w": 10**40},
        "name is not UTF-8": {"names": ["tr\udcffe"]},
        "name is not text": {"names": [None]},
        "object without names": {"names": "tree"},
        "object without a usable object_id": {"object_id": -1},
        "object id occurs again in the image": {},
    }
    said = {}
    for image_id, (reason, change) in enumerate(changes.items(), start=20):
        vg.add("train", image_id, ("man", "tree", "sky", "tree"), ((0, "on", 1),))
        vg.object(image_id, 3).update(change or {"object_id": 100 * image_id})
        said["objects.json", reason] = [f"image {image_id}, object {vg.object(image_id, 3)['object_id']}"]
    return said


def test_each_faulty_object_is_named_and_left_out(tmp_path):
    vg = plain_set()
    said = bad_objects(vg)
    vg.object(1, 0)["x"] = -7  # over the edge: kept as it is
    report = prepare(vg.write(tmp_path / "root"), tmp_path / "out", LOW)
    assert faults(report) == said
    assert report.parts["objects"] == {f"fault: {reason}": 1 for _, reason in said}
    images = load_by_facts(tmp_path / "out" / "train.h5")
    assert [len(image["ids"]) for image in images] == [3] * (4 + len(said))
    assert images[0]["boxes"][0] == [-7, 0, 40, 50]
    assert report.notes["boxes_kept_that_reach_over_the_edge"] == 1


def test_faulty_records_elsewhere_are_named_and_left_out(tmp_path):
    vg = plain_set()
    for image_id in range(30, 37):
        vg.add("train", image_id, ("man", "tree", "sky"), ((0, "on", 1), (2, "above", 1)))
    urls = {30: "https://x.org/../30.jpg", 31: "/etc/31.jpg", 32: "https://x.org/VG/..", 33: "file:///etc/33.jpg",
            34: 5}  # fmt: skip
    for record in vg.image_data:
        record["url"] = urls.get(record["image_id"], record["url"])
    vg.image_data[-1]["width"] = 0
    vg.image_data.append(dict(vg.image_data[0], width=1))
    vg.objects.append({"image_id": 2, "objects": []})
    vg.objects.append({"image_id": "7", "objects": []})
    rows = vg.relationships[0]["relationships"]
    rows.append({**rows[0], "predicate": "\udcff"})
    rows.append({**rows[0], "subject": {}})
    rows.append("on")
    vg.attributes[0]["attributes"][0]["attributes"] = ["re\udcffd", "tall"]
    vg.object_alias += "tree,tr\udcffees\n"
    report = prepare(vg.write(tmp_path / "root"), tmp_path / "out", LOW)
    leaves = "image path that is absolute or leaves its folder"
    assert faults(report) == {
        ("object_alias.txt", "alias is not UTF-8"): ["line 2"],
        ("image_data.json", leaves): ["image 30", "image 31", "image 32"],
        ("image_data.json", "url that is not http"): ["image 33"],
        ("image_data.json", "url is not text"): ["image 34"],
        ("image_data.json", "no usable width and height"): ["image 36"],
        ("image_data.json", "image id occurs again"): ["image 1"],
        ("objects.json", "image id occurs again"): ["image 2"],
        ("objects.json", f"record without a usable image_id{TEXT}"): ["record 14"],
        ("relationships.json", "predicate is not UTF-8"): ["image 1, relation 10"],
        ("relationships.json", "subject without a usable object_id"): ["image 1, relation 10"],
        ("relationships.json", "relation without a usable relationship_id"): ["image 1, relation 'on'"],
        ("attributes.json", "attribute is not UTF-8"): ["image 1, object 100"],
    }
    assert report.dropped["train"] == {"faulty record in image_data.json": [30, 31, 32, 33, 34, 36]}
    images = load_by_facts(tmp_path / "out" / "train.h5")
    assert [image["id"] for image in images] == [1, 2, 3, 4, 35]
    assert images[0]["path"] == "VG_100K_2/1.jpg" and len(images[1]["ids"]) == 3
    assert f"fault in image_data.json: {leaves}: 3 (image 30, image 31, image 32)" in report.table()


def spoil(name: str, content: str | bytes | None):
    def change(root: Path) -> None:
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil("attributes.json", None), "attributes.json missing; annotations (version 1.4)"),
        (spoil("objects.json", '[{"image_id": 1, "objects": [}]'), "objects.json: not usable JSON: "),
        (spoil("objects.json", '[{"image_id": 1, "objects": []}, {"ima'), "at character 34"),
        (spoil("objects.json", '[{"image_id": 1, "objects": []}'), "the list ends early at character 31"),
        (spoil("objects.json", "[] []"), "more text after the list"),
        (spoil("image_data.json", "{}"), "image_data.json: not usable JSON: must be a list of records"),
        (spoil("relationships.json", "[" * 100_000), "relationships.json: not usable JSON: nested too deeply"),
        (spoil("objects.json", '[{"id": 1, "objects": []}]'), "objects.json is not Visual Genome 1.4 but an earlier"),
        (spoil("objects.json", '[{"file": 1, "objects": []}]'), "objects.json: no record has an image_id"),
        (spoil("vg_splits.json", "[1]"), "vg_splits.json: must be an object with the lists train, val, test"),
        (spoil("vg_splits.json", '{"train": [], "val": [], "test": []}'), "no training image passes the first filters"),
        (spoil("vg_splits.json", b"\xff"), "vg_splits.json: not usable JSON"),
        (spoil("vocab.json", '{"object_idx_to_name": 3}'), "vocab.json: object_idx_to_name must be a list"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_2(tmp_path, capsys, change, reason):
    root = plain_set().write(tmp_path / "root")
    change(root)
    low = [f"--min-{what}-instances=2" for what in ("object", "relation", "attribute")]
    assert main(["vg", "--root", str(root), "--out", str(tmp_path / "out"), *low]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("prepare:")]
    assert len(said) == 1 and reason in said[0] and out == "" and "Traceback" not in err
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_bad_settings_are_refused(tmp_path, capsys):
    paths = ["--root", str(tmp_path), "--out", str(tmp_path)]
    assert main(["vg", *paths, "--max-objects", "0"]) == 2
    assert main(["vg", *paths, "--min-relations", "40"]) == 2
    assert "--min-relations 40 is more than --max-relations 30" in capsys.readouterr().err


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


def test_same_bytes_twice_and_nothing_else_left_behind(tmp_path):
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    prepare(root, out, LOW)
    assert sorted(os.listdir(out)) == sorted([*RESULT, "lock"])
    first = {name: (out / name).read_bytes() for name in RESULT}
    with pytest.raises(PrepareError, match=r"already holds a set; --overwrite replaces it \(there: train\.h5, "):
        prepare(root, out, LOW)
    (out / "images").mkdir()
    prepare(root, out, LOW, overwrite=True)
    assert {name: (out / name).read_bytes() for name in RESULT} == first
    assert sorted(os.listdir(out)) == sorted([*RESULT, "images", "lock"])


def test_a_failure_while_writing_leaves_the_earlier_result(tmp_path, monkeypatch):
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    prepare(root, out, LOW)
    before = {name: (out / name).read_bytes() for name in RESULT}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sgg_fast.data.prepare.report.Report.text", full)
    with pytest.raises(OSError, match="No space"):
        prepare(plain_set(2).write(tmp_path / "other"), out, LOW, overwrite=True)
    assert {name: (out / name).read_bytes() for name in RESULT} == before
    assert sorted(os.listdir(out)) == sorted([*RESULT, "lock"])


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


def test_names_that_no_graph_can_have_are_left_out_and_what_is_written_is_read(tmp_path):
    """Writer and reader have one definition (`clean_name`); sg2im's own would have written them."""
    vg = plain_set()
    for image_id, name in enumerate(["", " ", "__image__", "x" * 201, "a\x07b"] * 2, start=40):
        vg.add("train", image_id, ("man", "tree", "sky", name), ((0, "on", 1), (0, name, 2)), {3: [name]})
    vg.object(40, 3)["names"] = ["", "tree"]
    report = prepare(vg.write(tmp_path / "root"), tmp_path / "out", LOW)
    said = "that no graph can have: empty, reserved, too long or with control characters"
    assert report.parts["objects"][f"fault: name {said}"] == 9
    assert report.parts["relations"][f"fault: predicate {said}"] == 10
    assert report.fault_counts["attributes.json", f"attribute {said}"] == 10
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    names = [name for kind in ("object", "pred", "attribute") for name in vocabulary[f"{kind}_idx_to_name"]]
    assert all(name.strip() == name and 0 < len(name) < 200 for name in names) and names.count("__image__") == 1
    graphs, _ = read_split(tmp_path / "out" / "train.h5", read_vocabulary(tmp_path / "out" / "vocab.json"), True)
    assert len(graphs) == report.kept["train"] == 14 and graphs[4].objects == ("man", "tree", "sky", "tree")


@pytest.mark.parametrize("names", ["sg2im", "clean"])
def test_fractional_boxes_are_kept_and_boxes_outside_follow_sg2im_under_its_names(tmp_path, names):
    vg = plain_set()
    vg.object(1, 0).update(x=1.4, w=40.6)
    vg.object(1, 1).update(h=31.9)  # below the least side
    vg.object(2, 0).update(x=300)  # outside: sg2im does not look
    filters = dataclasses.replace(LOW, names=names, min_objects=2, min_relations=0)
    report = prepare(vg.write(tmp_path / "root"), tmp_path / "out", filters)
    images = {image["id"]: image for image in load_by_facts(tmp_path / "out" / "train.h5")}
    assert images[1]["boxes"][0] == [1, images[1]["boxes"][0][1], 41, 50] and len(images[1]["boxes"]) == 2
    assert report.notes["boxes_rounded_to_whole_pixels"] == 1
    assert report.parts["objects"].get("fault: box outside the image", 0) == (names == "clean")
    assert (images[2]["boxes"][0][0] == 300) == (names == "sg2im")


def test_refusals_name_the_cause_and_the_report_is_written(tmp_path, capsys):
    """`name` for `names`, ids in quotes: not merely that no image passes the last filter."""
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    low = [f"--min-{what}-instances=2" for what in ("object", "relation", "attribute")]
    argv = ["vg", "--root", str(root), "--out", str(out), *low]
    objects = json.loads((root / "objects.json").read_text())
    good = json.dumps(objects)
    for change, said in (
        (lambda o: {**{k: v for k, v in o.items() if k != "names"}, "name": "man"},
         "object without names: it has name, in place of the list names"),
        (lambda o: {**o, "object_id": str(o["object_id"])}, f"object without a usable object_id{TEXT}"),
        (lambda o: {**o, "object_id": float(o["object_id"])}, "it is written with a decimal point"),
    ):  # fmt: skip
        rows = [{**image, "objects": list(map(change, image["objects"]))} for image in objects]
        (root / "objects.json").write_text(json.dumps(rows))
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert said in err and str(out / "report.json") in err
        assert any(said in fault["reason"] for fault in json.loads((out / "report.json").read_text())["faults"])
    (root / "objects.json").write_text(good)
    assert main(argv) == 0, "the report of a refusal is no set: the same command needs no --overwrite"
    whole = (out / "report.json").read_bytes()
    (root / "objects.json").write_text("[]")
    assert main([*argv, "--overwrite"]) == 2 and (out / "report.json").read_bytes() == whole
    assert (out / "refused.json").is_file() and "refused.json" in capsys.readouterr().err


def test_a_line_separator_in_an_alias_is_no_end_of_line_and_a_byte_order_mark_no_letter(tmp_path):
    path = tmp_path / "alias.txt"
    path.write_bytes("\ufeffman,me\u2028n,guy\r\ntree,trees\n".encode())
    aliases = read_aliases(path, False, Report({}, {"train": None}))
    assert aliases == {"man": "man", "me\u2028n": "man", "guy": "man", "tree": "tree", "trees": "tree"}


def test_a_changed_byte_of_a_prepared_set_is_noticed_and_both_cures_work(tmp_path, capsys):
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    prepare(root, out, LOW)
    for name in ("train.h5", "vocab.json"):
        spoilt = bytearray((out / name).read_bytes())
        spoilt[len(spoilt) // 2] ^= 1
        (out / name).write_bytes(spoilt)
        with pytest.raises(ConfigError, match=rf"{name}: its bytes are not those .*--overwrite.*delete sha256\.json"):
            vg_source(out, 32, check=False)
        prepare(root, out, LOW, overwrite=True)
        assert len(vg_source(out, 32, check=False)) == 4
    (out / "vocab.json").write_text((out / "vocab.json").read_text().replace('"man"', '"woman"'))
    with pytest.raises(ConfigError, match=r"vocab\.json: its bytes"):
        vg_source(out, 32, check=False)
    (out / "sha256.json").unlink()
    assert "woman" in vg_source(out, 32, check=False).graphs[0].objects
