"""Visual Genome, LAION-SG and GQA: recognised by content, read as the same scenes; what they hold that no graph can."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from support import PUBLISHED
from support.published import GQA, LAION_SG, LAYOUTS, SCENES, VISUAL_GENOME_RELATIONSHIPS, VISUAL_GENOME_SCENE_GRAPHS

from sgg_fast.data.formats import load_scene_graphs, parse_scene_graphs, read_scene_graphs
from sgg_fast.data.layouts import read_document
from sgg_fast.graph import SceneGraph, SceneGraphError

SHARED = PUBLISHED / "visual_genome_v1.2_sample"


def named(graph: SceneGraph, with_relations: bool = True) -> tuple[list[str], list[tuple[str, str, str]]]:
    """What a graph says, whatever the order of its objects and relations."""
    triples = sorted((graph.objects[s], p, graph.objects[o]) for s, p, o in graph.relations)
    return sorted(graph.objects), triples if with_relations else []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same_scenes(layout):
    document = copy.deepcopy(LAYOUTS[layout])
    found = parse_scene_graphs(document, layout)
    relations = layout != "vg attributes"
    assert [named(graph) for graph in found] == [named(scene, relations) for scene in SCENES]
    assert document == LAYOUTS[layout], "not modified"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("psg", "vg regions")])
def test_one_graph_of_a_layout_alone_and_as_json_lines(layout):
    graphs = list(LAYOUTS[layout].values()) if isinstance(LAYOUTS[layout], dict) else LAYOUTS[layout]
    whole = parse_scene_graphs(LAYOUTS[layout])
    assert [parse_scene_graphs(graph)[0] for graph in graphs] == whole
    lines = "\n\n".join(json.dumps(graph) for graph in graphs) + "\n"
    assert read_scene_graphs(lines.encode(), "x.jsonl") == whole
    assert read_scene_graphs(lines.replace("\n", "\r\n").encode(), "x.jsonl") == whole


def test_layouts_may_be_mixed():
    mixed = [LAYOUTS["sg2im"][0], LAION_SG[1], VISUAL_GENOME_RELATIONSHIPS[0], GQA["n161313"]]
    assert [named(g) for g in parse_scene_graphs(mixed)] == [named(SCENES[i]) for i in (0, 1, 0, 1)]


def test_gqa_relations_may_be_in_braces_as_its_description_has_them():
    graph = {"objects": {"1": {"name": "chair", "relations": {"32452": {"name": "on", "object": "2"}}},
                         "2": {"name": "floor"}}}  # fmt: skip
    assert parse_scene_graphs(graph) == [SceneGraph(("chair", "floor"), ((0, "on", 1),))]


def test_what_published_files_hold_and_no_graph_can_is_left_out_with_a_warning(caplog):
    image = copy.deepcopy(VISUAL_GENOME_SCENE_GRAPHS[0])
    image["objects"].append(copy.deepcopy(image["objects"][0]))
    image["relationships"] += [
        {"predicate": "above", "subject_id": 10, "object_id": 12},
        {"predicate": "near", "subject_id": 10, "object_id": 10},
        {"predicate": "", "subject_id": 10, "object_id": 11},
    ]
    empty = {"image_id": 3, "objects": [], "relationships": []}
    assert [named(graph) for graph in parse_scene_graphs([image, empty], "vg.json")] == [named(SCENES[0])]
    assert [record.getMessage() for record in caplog.records] == [
        "vg.json: [0].objects[3]: left out: a second object with id 10",
        "vg.json: [0].relationships[2]: left out: an exact duplicate",
        "vg.json: [0].relationships[3]: left out: object 0 is related to itself",
        "vg.json: [0].relationships[4]: left out: it has no predicate",
        "vg.json: [1]: left out: a graph without objects",
    ]


def test_many_such_places_are_a_number(caplog):
    document = {"objects": ["a", "b"], "relationships": [[0, "on", 1]] * 500}
    parse_scene_graphs(document, "g.json")
    assert len(caplog.records) == 6
    assert caplog.records[-1].getMessage() == "g.json: 494 more left out for such reasons"


def broken(document, *path, value):
    """A copy of the document with one place changed."""
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (broken(LAION_SG, 1, "relations", 0, "item2", value=7), "[1].relations[0].item2: there is no object with id 7"),
        (broken(LAION_SG, 0, "items", 1, "label", value=""), "[0].items[1]: a name must be a non-empty string"),
        (broken(LAION_SG, 0, "items", 1, "attributes", value="white"), "[0].items[1].attributes: must be a list"),
        (broken(LAION_SG, 0, "items", 1, "attributes", value=[3]), "[0].items[1].attributes[0]: a name must be"),
        (broken(LAION_SG, 0, "items", value={}), "[0].items: must be a list of objects in braces"),
        (broken(LAION_SG, 0, "items", 2, value="grass"), "[0].items[2]: must be an object in braces, not 'grass'"),
        (broken(LAION_SG, 0, "relations", 0, "relation", value=None), "[0].relations[0]: a name must be"),
        (broken(VISUAL_GENOME_RELATIONSHIPS, 0, "relationships", 1, "subject", value=3),
         "[0].relationships[1].subject: must be an object in braces, not 3"),
        (broken(VISUAL_GENOME_RELATIONSHIPS, 0, "relationships", 1, "object", "object_id", value=[1]),
         "[0].relationships[1].object: an object's id must be an integer or a string, not a list"),
        (broken(VISUAL_GENOME_SCENE_GRAPHS, 1, "relationships", 0, "object_id", value=99),
         "[1].relationships[0].object_id: there is no object with id 99"),
        (broken(GQA, "n161313", "objects", "681267", "relations", 0, "object", value="5"),
         "['n161313'].objects['681267'].relations[0].object: there is no object with id '5'"),
        (broken(GQA, "2407890", "objects", "271881", "name", value=None), "['2407890'].objects['271881']: a name must"),
        ({"image_id": 3, "objects": []}, "no graph in it has an object"),
        ({"items": []}, "no graph in it has an object"),
        ({"objects": ["a"] * 4097}, "objects[4096]: more than 4096 objects and relations in one graph"),
        ({"objects": ["a" * 201]}, "objects[0]: a name of 201 characters; at most 200"),
        ({"objects": ["a\x1b[2J"]}, "objects[0]: the name holds a control character"),
    ],
)  # fmt: skip
def test_errors_name_the_place(document, message):
    with pytest.raises(SceneGraphError) as caught:
        parse_scene_graphs(document, "x.json")
    assert str(caught.value).startswith(f"x.json: {message}") and len(str(caught.value)) < 200


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"Visual Genome's sample annotations are not in {SHARED}")
@pytest.mark.parametrize(
    ("name", "key"), [("objects", "objects"), ("attributes", "attributes"), ("relationships", None)]
)
def test_visual_genomes_own_files(name, key):
    raw = json.loads((SHARED / f"{name}.json").read_text())
    graphs = load_scene_graphs(SHARED / f"{name}.json")
    assert len(graphs) == len(raw) == 5
    for graph, image in zip(graphs, raw, strict=True):
        if key:
            wanted = [" ".join([*o.get("attributes", []), o["names"][0]]).lower().split() for o in image[key]]
            assert [name.lower().split() for name in graph.objects] == wanted and not graph.relations
            continue
        triples = {
            (r["subject"]["object_id"], r["predicate"].lower().strip(), r["object"]["object_id"])
            for r in image["relationships"]
        }
        ids = {end["object_id"] for r in image["relationships"] for end in (r["subject"], r["object"])}
        assert (len(graph.objects), len(graph.relations)) == (len(ids), len([t for t in triples if t[0] != t[2]]))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"Visual Genome's sample annotations are not in {SHARED}")
def test_a_file_of_visual_genome_that_holds_no_graph_is_refused():
    with pytest.raises(SceneGraphError, match=r"image_data.json: \[0\].objects: must be a non-empty list of names"):
        load_scene_graphs(SHARED / "image_data.json")


def read_one(document: Any) -> SceneGraph:
    (graph,) = read_document(document, "f")
    return graph


SHEEP_ON_GRASS = SceneGraph(("sheep", "grass"), ((0, "on", 1),))


def test_the_image_node_of_sg2ims_own_files_is_left_to_the_model():
    graph = {"objects": ["__image__", "sheep", "grass"],
             "relationships": [[1, "__in_image__", 0], [1, "on", 2], [2, "__in_image__", 0]]}  # fmt: skip
    assert read_one(graph) == SHEEP_ON_GRASS
    with pytest.raises(SceneGraphError, match=r"f: relationships\[0\]: relates __image__ by another predicate than"):
        read_document({**graph, "relationships": [[1, "on", 0]]}, "f")


def test_attributes_of_visual_genome_1_0_and_an_empty_record():
    clock = {"id": 38203, "object_names": ["Clock"], "attributes": ["green"], "x": 421, "y": 91, "w": 79, "h": 339}
    assert read_one([{"attributes": [clock], "id": 1}, {"attributes": [], "id": 2}]).objects == ("green clock",)
    with pytest.raises(SceneGraphError, match="no graph in it has an object"):
        read_document([{"attributes": [], "id": 2}], "f")


def test_a_region_is_a_graph():
    region = {"region_id": 4, "phrase": "a sheep on grass", "x": 0, "objects": [
        {"object_id": 8, "name": "sheep", "synsets": []}, {"object_id": 9, "name": "grass", "synsets": []}],
        "relationships": [{"relationship_id": 1, "predicate": "ON", "subject_id": 8, "object_id": 9}]}  # fmt: skip
    empty = {"region_id": 5, "phrase": "sky", "objects": [], "relationships": []}
    assert read_document([{"image_id": 1, "regions": [region, empty, region]}], "f") == [SHEEP_ON_GRASS] * 2
    with pytest.raises(SceneGraphError, match=r"f: \[0\]\.regions\[0\]\.relationships\[0\].*no object with id 8"):
        read_document([{"regions": [{**region, "objects": []}]}], "f")


def test_psg_names_things_by_the_lists_of_its_file():
    file = {"thing_classes": ["sheep"], "stuff_classes": ["sky", "grass"], "predicate_classes": ["over", "on"],
            "data": [{"image_id": "1", "file_name": "a.jpg", "segments_info": [
                {"id": 1, "category_id": 0, "isthing": 1}, {"id": 2, "category_id": 2, "isthing": 0}],
                "relations": [[0, 1, 1]], "annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]}]}  # fmt: skip
    assert read_one(file) == SHEEP_ON_GRASS
    for change, said in (
        ({"relations": [[0, 1, 2]]}, "data[0].relations[0]: 2 is no index of the file's predicate_classes"),
        ({"relations": [[0, 2, 1]]}, "data[0].relations[0]: object index 2, but the graph has 2 objects"),
        ({"segments_info": [{"category_id": 3}]}, "segments_info[0]: 3 is no index of the file's thing_classes"),
    ):
        with pytest.raises(SceneGraphError, match=re.escape(said)):
            read_document({**file, "data": [{**file["data"][0], **change}]}, "f")
    with pytest.raises(SceneGraphError, match="a record of PSG, whose names are in the lists of its file; give that"):
        read_document(file["data"], "f")


def test_triples_of_words():
    both = [["sheep", "on", "grass"], ["sky", "above", "grass"]]
    graph = SceneGraph(("sheep", "grass", "sky"), ((0, "on", 1), (2, "above", 1)))
    assert read_one(both) == graph
    assert read_document([both, both], "f") == [graph, graph]
    assert read_one([{"subject": s, "predicate": p, "object": o} for s, p, o in both]) == graph
    assert read_one([{"subject": s, "relation": p, "object": o} for s, p, o in both]) == graph
    with pytest.raises(SceneGraphError, match=r"f: \[0\]: 'sheep' is related to itself; of two things of one name"):
        read_document([["sheep", "near", "sheep"]], "f")
    cure = {"objects": ["sheep", "sheep"], "relationships": [[0, "near", 1]]}
    assert read_one(cure).objects == ("sheep", "sheep")


def test_vrd_is_named_as_it_holds_numbers_only():
    end = {"category": 3, "bbox": [1, 2, 3, 4]}
    file = {"a.jpg": [{"predicate": 0, "subject": end, "object": end}], "b.jpg": []}
    with pytest.raises(SceneGraphError, match=r"^f: in VRD's format, which names things by number; put the words of"):
        read_document(file, "f")
