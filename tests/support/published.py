"""The same two scenes in every published layout, written from the formats' descriptions, and what damages them."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from sgg_fast.graph import SceneGraph

SCENES = [
    SceneGraph(("sky", "white sheep", "grass"), ((1, "standing on", 2), (0, "above", 2))),
    SceneGraph(("man", "old red hat"), ((0, "wearing", 1),)),
]


def _vg_object(object_id: int, name: str, **more: Any) -> dict[str, Any]:
    box = {"x": 3, "y": 5, "w": 40, "h": 30, "synsets": [f"{name}.n.01"]}
    return {"object_id": object_id, "names": [name], **box, **more}


VISUAL_GENOME_ATTRIBUTES: list[Any] = [
    {"image_id": 1, "attributes": [_vg_object(10, "sky"), _vg_object(11, "sheep", attributes=["white"]),
                                   _vg_object(12, "grass", attributes=None)]},
    {"image_id": 2, "attributes": [_vg_object(20, "Man"), _vg_object(21, "hat", attributes=["old", "red"])]},
]  # fmt: skip
"""attributes.json; objects.json is the same with "objects" and without attributes."""


def _vg_end(object_id: int, name: str) -> dict[str, Any]:
    return {"object_id": object_id, "name": name, "x": 3, "y": 5, "w": 40, "h": 30, "synsets": []}


VISUAL_GENOME_RELATIONSHIPS: list[Any] = [
    {"image_id": 1, "relationships": [
        {"relationship_id": 1, "predicate": "standing ON", "synsets": ["along.r.01"],
         "subject": _vg_end(11, "white sheep"), "object": _vg_end(12, "grass")},
        {"relationship_id": 2, "predicate": "above", "synsets": [],
         "subject": _vg_end(10, "sky"), "object": _vg_end(12, "grass")}]},
    {"image_id": 2, "relationships": [
        {"relationship_id": 3, "predicate": "wearing", "synsets": [],
         "subject": _vg_end(20, "man"), "object": _vg_end(21, "old red hat")}]},
]  # fmt: skip

VISUAL_GENOME_SCENE_GRAPHS: list[Any] = [
    {"image_id": 1,
     "objects": [_vg_object(10, "sky"), _vg_object(11, "sheep", attributes=["white"]), _vg_object(12, "grass")],
     "relationships": [{"relationship_id": 1, "predicate": "standing on", "subject_id": 11, "object_id": 12},
                       {"relationship_id": 2, "predicate": "ABOVE", "subject_id": 10, "object_id": 12}]},
    {"image_id": 2, "objects": [_vg_object(20, "man"), _vg_object(21, "hat", attributes=["old", "red"])],
     "relationships": [{"relationship_id": 3, "predicate": "wearing", "subject_id": 20, "object_id": 21}]},
]  # fmt: skip


def _item(item_id: int, label: str, *attributes: str) -> dict[str, Any]:
    return {"item_id": item_id, "label": label, "attributes": list(attributes), "global_item_id": 3201429 + item_id}


def _triple(triple_id: int, item1: int, relation: str, item2: int) -> dict[str, Any]:
    ids = {"triple_id": triple_id, "global_relation_id": 2118510 + triple_id}
    return {"item1": item1, "relation": relation, "item2": item2, **ids}


LAION_SG: list[Any] = [
    {"img_id": "482027", "name": "8040361340228797010.jpg", "caption_ori": "a sheep", "score": "6.67", "url": "http://x",
     "items": [_item(0, "sky"), _item(1, "sheep", "white"), _item(2, "grass")],
     "relations": [_triple(0, 1, "standing on", 2), _triple(1, 0, "above", 2)]},
    {"img_id": "482028", "name": "1.jpg", "caption_ori": "a man", "score": "6.5", "url": "http://y",
     "items": [_item(0, "man"), _item(1, "hat", "old", "red")], "relations": [_triple(0, 0, "wearing", 1)]},
]  # fmt: skip


def _gqa_object(name: str, attributes: list[str], *relations: tuple[str, str]) -> dict[str, Any]:
    listed = [{"name": predicate, "object": target} for predicate, target in relations]
    return {"name": name, "x": 1, "y": 2, "w": 30, "h": 40, "attributes": attributes, "relations": listed}


GQA: dict[str, Any] = {
    "2407890": {"width": 640, "height": 480, "location": "field", "weather": None, "objects": {
        "271881": _gqa_object("sky", []),
        "271882": _gqa_object("sheep", ["white"], ("standing on", "275312")),
        "275312": _gqa_object("grass", [])}},
    "n161313": {"width": 640, "height": 480, "objects": {
        "681267": _gqa_object("man", [], ("wearing", "681268")), "681268": _gqa_object("hat", ["old", "red"])}},
}  # fmt: skip
GQA["2407890"]["objects"]["271881"]["relations"] = [{"name": "above", "object": "275312"}]

SG2IM: list[Any] = [
    {"objects": list(scene.objects), "relationships": [list(relation) for relation in scene.relations]}
    for scene in SCENES
]

PSG: dict[str, Any] = {
    "thing_classes": ["man", "white sheep"], "stuff_classes": ["sky", "grass", "old red hat"],
    "predicate_classes": ["above", "standing on", "wearing"],
    "data": [
        {"image_id": "1", "segments_info": [{"category_id": 2}, {"category_id": 1}, {"category_id": 3}],
         "relations": [[1, 2, 1], [0, 2, 0]]},
        {"image_id": "2", "segments_info": [{"category_id": 0}, {"category_id": 4}], "relations": [[0, 1, 2]]},
    ],
}  # fmt: skip

TRIPLES: list[Any] = [[[scene.objects[s], p, scene.objects[o]] for s, p, o in scene.relations] for scene in SCENES]

LAYOUTS: dict[str, Any] = {
    "sg2im": SG2IM,
    "vg attributes": VISUAL_GENOME_ATTRIBUTES,
    "vg relationships": VISUAL_GENOME_RELATIONSHIPS,
    "vg scene graphs": VISUAL_GENOME_SCENE_GRAPHS,
    "vg regions": [{"image_id": 7, "regions": VISUAL_GENOME_SCENE_GRAPHS}],
    "laion-sg": LAION_SG,
    "gqa": GQA,
    "psg": PSG,
    "triples": TRIPLES,
}

RECORD: dict[str, Any] = {"graph": SG2IM[0], "seed": 3, "steps": 5, "guidance": 4.0, "size": 64, "scheduler": "ddim",
                          "model": "toy", "weights": "0"}  # fmt: skip
"""The record in a picture of the first scene."""

WEIRD = st.sampled_from(
    [None, True, False, 0, -1, 3, 10**25, 10**400, 0.5, -0.0, 1e999, math.nan, "", " ", "a", "\ud800", "\x00",
     "x" * 300, "__image__", [], {}, [[]], [None], {"": None}, [[[[[[[[[]]]]]]]]], list(range(5000)), ["a"] * 5000,
     {"name": 3}, {"object_id": 1, "names": []}, {"objects": {}}, {"objects": [{}]}]
)  # fmt: skip
"""Values that a file may hold in place of others."""


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `node`."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *places(node[key])]]
