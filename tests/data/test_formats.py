"""Files and sg2im's JSON: what loads, what is left out with a warning, and that every error names file, place, reason.

The other layouts are in test_layouts.py, mutated files of all of them in end_to_end/test_mutations.py.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PUBLISHED

from sgg_fast.data.formats import load_scene_graphs, parse_scene_graphs
from sgg_fast.graph import SceneGraph, SceneGraphError

SG2IM = PUBLISHED / "sg2im_scene_graphs"

SHEEP = {"objects": ["sky", "grass", "sheep"], "relationships": [[0, "above", 1], [2, "standing on", 1]]}
SHEEP_GRAPH = SceneGraph(("sky", "grass", "sheep"), ((0, "above", 1), (2, "standing on", 1)))

KNOWN = 'a graph must be an object with "objects" and "relationships", or a list of triples'


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "graph.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(path: Path) -> str:
    """The message, which must be one line, without the folder in front."""
    with pytest.raises(SceneGraphError) as caught:
        load_scene_graphs(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 200
    return message[len(str(path.parent)) + 1 :]


def test_one_graph_and_a_list(tmp_path):
    assert load_scene_graphs(write(tmp_path, json.dumps(SHEEP))) == [SHEEP_GRAPH]
    alone = {"objects": ["boat"]}
    assert load_scene_graphs(write(tmp_path, json.dumps([alone, SHEEP]))) == [SceneGraph(("boat",)), SHEEP_GRAPH]
    assert load_scene_graphs(str(write(tmp_path, json.dumps(SHEEP)))) == [SHEEP_GRAPH]


def test_white_space_is_made_single_and_strings_are_kept_otherwise():
    document = {"objects": ["  red \t hat\n", "Café", "羊"], "relationships": [[0, " left  of ", 2]]}
    assert parse_scene_graphs(document) == [SceneGraph(("red hat", "Café", "羊"), ((0, "left of", 2),))]


def test_unknown_keys_are_ignored():
    assert parse_scene_graphs({**SHEEP, "image_id": 5, "weights": [None]}) == [SHEEP_GRAPH]


def test_self_loops_and_exact_duplicates_are_left_out_with_a_warning(caplog):
    document = {
        "objects": ["sheep", "sheep"],
        "relationships": [[0, "by", 1], [1, "by", 1], [0, " by", 1], [1, "by", 0], [0, "left of", 1]],
    }
    (graph,) = parse_scene_graphs([document], "graph.json")
    assert graph.relations == ((0, "by", 1), (1, "by", 0), (0, "left of", 1))
    assert [record.getMessage() for record in caplog.records] == [
        "graph.json: [0].relationships[1]: left out: object 1 is related to itself",
        "graph.json: [0].relationships[2]: left out: an exact duplicate",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_the_callers_data_is_not_modified():
    document = [{"objects": [" a ", "b"], "relationships": [[0, " on ", 1], [0, "on", 1], [1, "on", 1]]}]
    before = copy.deepcopy(document)
    parse_scene_graphs(document)
    assert document == before


FIVE = ["a", "b", "c", "d", "e"]
GOOD = [0, "on", 1]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            [SHEEP, SHEEP, {"objects": FIVE, "relationships": [GOOD, [1, "on", 2], [2, "on", 3], [0, "on", 7]]}],
            "graph.json: [2].relationships[3]: object index 7, but the graph has 5 objects",
        ),
        (
            {"objects": FIVE, "relationships": [[5, "on", 0]]},
            "graph.json: relationships[0]: object index 5, but the graph has 5 objects",
        ),
        (
            {"objects": FIVE, "relationships": [GOOD, [0, "on", -1]]},
            "graph.json: relationships[1]: object index -1, but the graph has 5 objects",
        ),
        (
            {"objects": FIVE, "relationships": [[0, "on", 10**4000]]},
            "graph.json: relationships[0]: object index a number too large, but the graph has 5 objects",
        ),
        (
            {"objects": FIVE, "relationships": [[True, "on", 0]]},
            "graph.json: relationships[0]: an object index must be an integer, not True",
        ),
        (
            {"objects": FIVE, "relationships": [["0", "on", 1]]},
            "graph.json: relationships[0]: an object index must be an integer, not '0'",
        ),
        (
            {"objects": FIVE, "relationships": [[0, "on", 1.0]]},
            "graph.json: relationships[0]: an object index must be an integer, not 1.0",
        ),
        (
            {"objects": FIVE, "relationships": [[0, "on", None]]},
            "graph.json: relationships[0]: an object index must be an integer, not None",
        ),
        (
            {"objects": FIVE, "relationships": [[0, "on", [1]]]},
            "graph.json: relationships[0]: an object index must be an integer, not a list",
        ),
        (
            [{"objects": FIVE, "relationships": [[0, 3, 1]]}],
            "graph.json: [0].relationships[0]: a name must be a non-empty string, not 3",
        ),
        (
            {"objects": FIVE, "relationships": [[0, "  ", 1]]},
            "graph.json: relationships[0]: a name must be a non-empty string, not '  '",
        ),
        (
            {"objects": FIVE, "relationships": [[0, "__in_image__", 1]]},
            "graph.json: relationships[0]: '__in_image__' is added by the model itself; leave it out",
        ),
        (
            {"objects": FIVE, "relationships": [[0, 1]]},
            "graph.json: relationships[0]: must be [subject, predicate, object]",
        ),
        (
            {"objects": FIVE, "relationships": ["0 on 1"]},
            "graph.json: relationships[0]: must be [subject, predicate, object]",
        ),
        (
            {"objects": FIVE, "relationships": {"0": "on"}},
            "graph.json: relationships: must be a list of [subject, predicate, object]",
        ),
        (
            {"objects": FIVE, "relationships": None},
            "graph.json: relationships: must be a list of [subject, predicate, object]",
        ),
        ([SHEEP, {"objects": []}], "graph.json: [1].objects: must be a non-empty list of names"),
        ({"relationships": []}, "graph.json: objects: must be a non-empty list of names"),
        ({"objects": "sheep"}, "graph.json: objects: must be a non-empty list of names"),
        ({"objects": ["a", ""]}, "graph.json: objects[1]: a name must be a non-empty string, not ''"),
        ({"objects": ["a", {}]}, "graph.json: objects[1]: a name must be a non-empty string, not an object"),
        (
            {"objects": [" __image__"]},
            "graph.json: no graph in it has an object",
        ),
        ({"objects": ["a\ud800"]}, "graph.json: objects[0]: the name holds a lone surrogate, which is not text"),
        ([], "graph.json: the list of graphs is empty"),
        ([SHEEP, 3], f"graph.json: [1]: {KNOWN}"),
        ("sheep", f"graph.json: {KNOWN}"),
        (None, f"graph.json: {KNOWN}"),
    ],
)
def test_errors_name_file_place_and_reason(tmp_path, document, message):
    assert error_of(write(tmp_path, json.dumps(document))) == message
    with pytest.raises(SceneGraphError) as caught:
        parse_scene_graphs(document, "graph.json")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ("  \n", "not JSON: Expecting value at line 2, column 1"),
        ('{"objects": ["a"],}', "not JSON: "),
        ('{"objects": ["a"]} x', "not JSON: Extra data at line 1, column 20"),
        ('{"objects": [NaN]}', "not usable JSON: NaN is not a JSON number"),
        ('{"objects": ["a"], "relationships": [[-Infinity, "on", 0]]}', "not usable JSON: -Infinity is not a JSON"),
        ('{"objects": ["a"], "relationships": [[1e999, "on", 0]]}', "relationships[0]: an object index must be an int"),
        ('{"objects": ["a"], "objects": ["b"]}', "not usable JSON: the key 'objects' occurs twice in one object"),
        ('[{"objects": ["a"], "x": {"k": 1, "k": 1}}]', "not usable JSON: the key 'k' occurs twice in one object"),
        ('{"objects": ["a"]}\n{"objects": ["b"]}\n{"objects": [', "line 3: not JSON: Expecting value at column 14"),
        ('{"objects": ["a"]}\n{"objects": []}', "line 2: objects: must be a non-empty list of names"),
        ("[" * 100_000, "not usable JSON: nested too deeply"),
        (f'{{"objects": ["a"], "relationships": [[{"9" * 5000}, "on", 0]]}}', "not usable JSON: Exceeds the limit"),
        (b'{"objects": ["caf\xe9"]}', "not UTF-8 text (byte 17)"),
        (json.dumps(SHEEP).encode("utf-16"), "not UTF-8 text (byte 0)"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8 text (byte 0)"),
    ],
)
def test_what_is_not_json(tmp_path, content, message):
    assert error_of(write(tmp_path, content)).startswith(f"graph.json: {message}")


def test_json_lines_are_recognised_by_content(tmp_path):
    lines = f'{json.dumps(SHEEP)}\n\n[{json.dumps(SHEEP)}, {{"objects": ["boat"]}}]\r\n'
    assert load_scene_graphs(write(tmp_path, lines)) == [SHEEP_GRAPH, SHEEP_GRAPH, SceneGraph(("boat",))]
    spread = json.dumps([SHEEP, SHEEP], indent=1)
    assert load_scene_graphs(write(tmp_path, f"\n{spread}\n")) == [SHEEP_GRAPH] * 2


def test_a_byte_order_mark_is_read_over(tmp_path):
    assert load_scene_graphs(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(SHEEP).encode())) == [SHEEP_GRAPH]


def test_a_file_that_cannot_be_opened(tmp_path):
    assert error_of(tmp_path / "missing.json") == "missing.json: cannot be read: No such file or directory"
    assert error_of(tmp_path).endswith("cannot be read: Is a directory")


@pytest.mark.parametrize("field", ["objects", "relationships", "index"])
def test_no_depth_of_nesting_escapes(tmp_path, field):
    """At every depth around the interpreter's limit, where parsing still works but printing may not."""
    limit = sys.getrecursionlimit()
    for depth in (10, limit // 2, *range(limit - 130, limit + 10, 3)):
        deep = "[" * depth + "]" * depth
        text = {
            "objects": f'{{"objects": ["a", {deep}]}}',
            "relationships": f'{{"objects": ["a"], "relationships": [{deep}]}}',
            "index": f'{{"objects": ["a"], "relationships": [[{deep}, "on", 0]]}}',
        }[field]
        error_of(write(tmp_path, text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["a", " b ", "red hat", "__image__", "\ud83d", ""]) | st.text(st.characters(), max_size=5)
relations = st.lists(st.integers(-1, 4) | names | json_values, max_size=4) | st.tuples(
    st.integers(0, 3), names, st.integers(0, 3)
).map(list)
documents = st.fixed_dictionaries(
    {}, optional={"objects": st.lists(names | json_values, max_size=4) | json_values,
                  "relationships": st.lists(relations, max_size=5) | json_values}
)  # fmt: skip


def assert_parses_or_explains(document: object) -> None:
    before = copy.deepcopy(document)
    try:
        graphs = parse_scene_graphs(document, "graph.json")
    except SceneGraphError as error:
        assert str(error).startswith("graph.json: ") and "\n" not in str(error) and len(str(error)) < 250
    else:
        sources = document if isinstance(document, list) else [document]
        for graph, source in zip(graphs, sources, strict=True):
            assert graph.objects == tuple(" ".join(name.split()) for name in source["objects"])
            wanted = {(s, " ".join(p.split()), o) for s, p, o in source.get("relationships", []) if s != o}
            assert set(graph.relations) == wanted and len(wanted) == len(graph.relations)
            "".join(graph.names).encode()
    assert repr(document) == repr(before)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(documents | st.lists(documents, max_size=3) | json_values)
def test_anything_parses_or_raises_scene_graph_error(document):
    assert_parses_or_explains(document)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_well_formed_documents_parse(data):
    """The other half: nothing valid is refused."""
    letters = st.characters(codec="utf-8", exclude_categories=["Cc"])
    word = st.text(letters, min_size=1, max_size=200).filter(str.strip).filter(lambda s: "__" not in s)
    objects = data.draw(st.lists(word, min_size=1, max_size=5))
    index = st.integers(0, len(objects) - 1)
    relationships = data.draw(st.lists(st.tuples(index, word, index).map(list), max_size=6))
    document = json.loads(json.dumps({"objects": objects, "relationships": relationships}))
    (graph,) = parse_scene_graphs(document)
    assert len(graph.objects) == len(objects)
    assert_parses_or_explains(document)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_file_loads_or_raises_scene_graph_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        graphs = load_scene_graphs(path)
    except SceneGraphError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert all(isinstance(graph, SceneGraph) for graph in graphs)


@pytest.mark.skipif(not SG2IM.is_dir(), reason=f"sg2im's published graphs are not at {SG2IM}")
@pytest.mark.parametrize(
    ("file", "num", "num_left_out"), [("figure_5_coco", 8, 4), ("figure_6_sheep", 7, 0), ("figure_6_street", 7, 0)]
)
def test_published_files_load(caplog, file, num, num_left_out):
    path = SG2IM / f"{file}.json"
    graphs = load_scene_graphs(path)
    assert len(graphs) == num and len(caplog.records) == num_left_out
    for graph, source in zip(graphs, json.loads(path.read_text()), strict=True):
        assert graph.objects == tuple(source["objects"])
        assert set(graph.relations) == {tuple(r) for r in source["relationships"] if r[0] != r[2]}
