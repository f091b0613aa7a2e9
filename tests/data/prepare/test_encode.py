"""The encoder of `prepare vg`: sg2im's filters on real annotations and small sets; every fault is named."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
from support import PUBLISHED
from support.small_sets import faults
from support.vg_files import LOW, SAMPLE, VgSet, load_by_facts, plain_set, real, sample_root

from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.encode import Filters
from sgg_fast.data.prepare.vg import prepare
from sgg_fast.data.vg_h5 import read_split, read_vocabulary

VOCABULARY = PUBLISHED / "vg_vocab.json"
TEXT = ": it is text in quotes, and ids are numbers"


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


def test_attributes_of_an_object_are_cut_at_the_most(tmp_path):
    vg = plain_set(3)
    vg.attributes[0]["attributes"][0]["attributes"] = ["tall", "green", "tall"]
    filters = Filters(**{**vars(LOW), "max_attributes": 2})
    prepare(vg.write(tmp_path / "root"), tmp_path / "out", filters)
    first = load_by_facts(tmp_path / "out" / "train.h5")[0]
    assert first["attributes"] == [[0, 1], [1, 0], []]


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


def test_bad_settings_are_refused(tmp_path, capsys):
    paths = ["--root", str(tmp_path), "--out", str(tmp_path)]
    assert main(["vg", *paths, "--max-objects", "0"]) == 2
    assert main(["vg", *paths, "--min-relations", "40"]) == 2
    assert "--min-relations 40 is more than --max-relations 30" in capsys.readouterr().err


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
