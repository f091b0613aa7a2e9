"""Scene graphs, the table of their words, and the packed batch with its plan against loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.graphs import GRAPHS, all_graphs, nodes, pack, shared_table, triples

from sgg_fast import ops
from sgg_fast.graph import (
    IMAGE_OBJECT,
    IN_IMAGE,
    NameTable,
    SceneGraph,
    SceneGraphBatch,
    SceneGraphError,
    plain,
    shown,
)


@pytest.mark.parametrize(
    ("objects", "relations", "message"),
    [
        ((), (), "a scene graph needs at least one object"),
        (("a", " "), (), r"objects\[1\]: a name must be a non-empty string, not ' '"),
        (("a", 3), (), r"objects\[1\]: a name must be a non-empty string, not 3"),
        ((["a"],), (), r"objects\[0\]: a name must be a non-empty string, not a list"),
        ((IMAGE_OBJECT,), (), r"objects\[0\]: '__image__' is added by the model itself"),
        (("a\ud800",), (), r"objects\[0\]: the name holds a lone surrogate"),
        (("a", "b"), ((0, "", 1),), r"relationships\[0\]: a name must be a non-empty string, not ''"),
        (("a", "b"), ((0, IN_IMAGE, 1),), r"relationships\[0\]: '__in_image__' is added by the model itself"),
        (("a", "b"), ((0, "on", 1), (0, "on", 2)), r"relationships\[1\]: object index 2, but the graph has 2 objects"),
        (("a", "b"), ((-1, "on", 1),), r"relationships\[0\]: object index -1, but the graph has 2 objects"),
        (("a", "b"), ((1, "on", 1),), r"relationships\[0\]: object 1 is related to itself"),
        (("a", "b"), ((True, "on", 0),), r"relationships\[0\]: an object index must be an integer, not True"),
        (("a", "b"), ((0.0, "on", 1),), r"relationships\[0\]: an object index must be an integer, not 0.0"),
        (("a", "b"), ((0, "on", 10**5000),), r"relationships\[0\]: object index a number too large"),
        (("a", "b"), ((0, "on"),), r"relationships\[0\]: must be \(subject, predicate, object\)"),
        (("a", "b"), ("on",), r"relationships\[0\]: must be \(subject, predicate, object\)$"),
    ],
)
def test_what_is_not_a_scene_graph(objects, relations, message):
    with pytest.raises(SceneGraphError, match=f"^{message}"):
        SceneGraph(objects, relations)


def test_errors_are_value_errors_and_one_short_line():
    with pytest.raises(ValueError) as caught:
        SceneGraph(("a", "b"), ((0, "x" * 5000, "y" * 5000),))
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_graphs_are_values():
    graph = SceneGraph(("sheep", "sheep"), ((0, "by", 1), (np.int64(1), "by", np.int32(0))))
    assert graph.names == ["sheep", "sheep", "by", "by"]
    assert graph == SceneGraph(("sheep", "sheep"), ((0, "by", 1), (1, "by", 0))) and hash(graph)
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.objects = ("goat",)


def test_name_table_keeps_one_id_a_string():
    table = NameTable(["sheep", "on", "sheep"])
    assert table.names == [IMAGE_OBJECT, IN_IMAGE, "sheep", "on"] and len(table) == 4
    assert table.add("on") == 3 and table.add("by") == 4 and "by" in table and "of" not in table
    assert list(table.spoken()) == ["image", "in image", "sheep", "on", "by"]


def test_a_word_spelled_like_the_spoken_image_is_its_own():
    """An object called "image" is not the image node."""
    batch, table = pack(SceneGraph(("image",)))
    assert batch.object_name.tolist() == [2, 0] and list(table.spoken()) == ["image", "in image", "image"]


def test_packed_fields_against_loops():
    graphs = all_graphs()
    batch, table = pack(*graphs)
    names, object_graph, object_pooled, object_ptr = [], [], [], [0]
    subjects, predicates, objects, relation_graph, relation_pooled, relation_ptr = [], [], [], [], [], [0]
    for b, graph in enumerate(graphs):
        for s, predicate, o in triples(graph):
            subjects.append(object_ptr[-1] + s)
            objects.append(object_ptr[-1] + o)
            predicates.append(predicate)
            relation_graph.append(b)
            relation_pooled.append(int(predicate != IN_IMAGE))
        names += nodes(graph)
        object_graph += [b] * len(nodes(graph))
        object_pooled += [int(name != IMAGE_OBJECT) for name in nodes(graph)]
        object_ptr.append(len(names))
        relation_ptr.append(len(subjects))
    assert [table.names[i] for i in batch.object_name] == names
    assert [table.names[i] for i in batch.predicate_name] == predicates
    expected = {
        "subject": subjects, "object": objects, "object_ptr": object_ptr, "relation_ptr": relation_ptr,
        "object_graph": object_graph, "relation_graph": relation_graph,
        "object_pooled": object_pooled, "relation_pooled": relation_pooled,
    }  # fmt: skip
    for field, values in expected.items():
        assert getattr(batch, field).tolist() == values, field
    assert batch.sizes.tolist() == [[len(nodes(g)), len(triples(g))] for g in graphs]
    assert (batch.num_graphs, batch.num_objects, batch.num_relations) == (len(graphs), len(names), len(subjects))


def test_plan_against_loops():
    """Each object's messages: relations it is the subject of, ascending, then those it is the object of."""
    batch, _ = pack(*all_graphs())
    ptr, mid, slot = (part.tolist() for part in batch.plan)
    assert ptr[0] == 0 and ptr[-1] == len(slot) == 2 * batch.num_relations
    for i in range(batch.num_objects):
        out = [e for e in range(batch.num_relations) if batch.subject[e] == i]
        into = [e for e in range(batch.num_relations) if batch.object[e] == i]
        assert slot[ptr[i] : mid[i]] == out
        assert slot[mid[i] : ptr[i + 1]] == into
        assert out or into, "no object is without a message"


def test_index_tensors_are_int32():
    batch, _ = pack(GRAPHS["chain"])
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.uint8 if field.name.endswith("pooled") else torch.int32), field.name
    assert batch.sizes.dtype == np.int64


def assert_same(found: SceneGraphBatch, expected: SceneGraphBatch) -> None:
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert np.array_equal(np.asarray(a), np.asarray(b)), field.name


@pytest.mark.parametrize("ids", [[0], [6, 2], [3, 3, 3], [4, 0, 6, 5, 1, 2, 3], [1, 4, 1]])
def test_drawing_from_a_store_is_packing_the_graphs(ids):
    graphs, table = all_graphs(), shared_table()
    store, _ = pack(*graphs, table=table)
    expected, _ = pack(*(graphs[i] for i in ids), table=table)
    assert_same(ops.pack(store, np.array(ids)), expected)


@pytest.mark.parametrize("ids", [[], [-1], [0, 7]])
def test_drawing_what_is_not_in_the_store(ids):
    store, _ = pack(*all_graphs())
    with pytest.raises(ValueError, match=r"pack: graph ids must lie in 0\.\.6"):
        ops.pack(store, np.array(ids, dtype=np.int64))


def test_packing_nothing_is_refused():
    with pytest.raises(SceneGraphError, match="no scene graph to pack"):
        SceneGraphBatch.from_graphs([], NameTable())


def test_phrases_say_the_relation_and_an_image_relation_its_object():
    batch, table = pack(SceneGraph(("red hat", "sheep"), ((1, "wearing", 0),)), SceneGraph(("sheep",)))
    assert [table.phrases[i] for i in batch.phrase.tolist()] == ["sheep wearing red hat", "red hat", "sheep", "sheep"]
    assert len(table.phrases) == 3, "a phrase is entered once"


def arrays(**changes: list) -> dict[str, np.ndarray]:
    """Two graphs of one object each, with what is to be changed."""
    good = {
        "names": [2, 0, 3, 0], "predicates": [1, 1], "subject": [0, 2], "object_": [1, 3], "sizes": [[2, 1], [2, 1]],
        "phrases": [0, 1],
    }  # fmt: skip
    return {name: np.asarray(values) for name, values in (good | changes).items()}


def test_from_arrays_is_what_from_graphs_packs():
    table = NameTable(["tree", "boat"])
    assert_same(
        SceneGraphBatch.from_arrays(**arrays()), pack(SceneGraph(("tree",)), SceneGraph(("boat",)), table=table)[0]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [[2, 1], [1, 1]]}, "sizes add up to 3, 2, not 4, 2"),
        ({"sizes": [[2, 1], [2, 2]]}, "sizes add up to 4, 3, not 4, 2"),
        ({"subject": [0, 0]}, "relation 1: subject 0 is not an object of graph 1"),
        ({"object_": [1, 4]}, "relation 1: object 4 is not an object of graph 1"),
        ({"subject": [-1, 2]}, "relation 0: subject -1 is not an object of graph 0"),
    ],
)
def test_from_arrays_checks_what_it_is_given(changes, message):
    with pytest.raises(ValueError, match=message):
        SceneGraphBatch.from_arrays(**arrays(**changes))


def test_bare_graphs_follow_the_whole_ones():
    graphs = all_graphs()
    batch, table = pack(*graphs)
    expected, _ = pack(*graphs, *(SceneGraph(graph.objects) for graph in graphs), table=table)
    found = batch.with_bare()
    for field in dataclasses.fields(SceneGraphBatch):
        assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_moving_a_batch_moves_every_tensor():
    batch, _ = pack(GRAPHS["chain"])
    moved = batch.to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == len(dataclasses.fields(batch)) - 1
    assert all(tensor.device.type == "meta" for tensor in tensors) and batch.subject.device.type == "cpu"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": 1}, "an object"),
        ((1, 2), "a list"),
        (2**64, "a number too large"),
        ("x" * 50, repr("x" * 40)),
        ("\x1b[2J", r"'\x1b[2J'"),
        (1.5, "1.5"),
        (True, "True"),
        (frozenset(range(99)), "frozenset({" + ", ".join(map(str, range(99)))[:49] + "..."),
    ],
)
def test_any_value_is_shown_in_a_few_characters(value, text):
    assert shown(value) == text and len(text) <= 63


def test_what_a_terminal_would_obey_is_escaped_and_the_rest_is_kept():
    assert plain("caf\u00e9 \u7f8a") == "caf\u00e9 \u7f8a"
    assert plain("a\x1b[2J\u202eb\udcff\n") == r"a\x1b[2J\u202eb\udcff\n"
