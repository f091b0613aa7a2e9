"""Graphs, strings, phrases and rows of large sets: what goes in comes out, in bytes and not in objects."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import all_graphs

from sgg_fast.data.packed import JoinedGraphs, PackedGraphs, PackedRows, PackedStrings
from sgg_fast.data.sources import PairSource, with_mirrored
from sgg_fast.data.spatial import mirrored_graph
from sgg_fast.graph import GraphPacker, NameTable, SceneGraph, SceneGraphBatch


def packed(graphs: list[SceneGraph]) -> tuple[GraphPacker, NameTable]:
    table = NameTable()
    packer = GraphPacker(table)
    for graph in graphs:
        packer.add(graph)
    return packer, table


def test_packed_graphs_are_the_graphs():
    graphs = all_graphs()
    packer, table = packed(graphs)
    found = PackedGraphs(packer.arrays(), table.names)
    assert list(found) == graphs and found[-1] == graphs[-1] and found[1:3] == graphs[1:3]
    joined = JoinedGraphs([found, found])
    assert list(joined) == graphs * 2 and joined[len(graphs)] == graphs[0] and joined[-1] == graphs[-1]
    for sequence in (found, joined):
        with pytest.raises(IndexError):
            sequence[len(sequence)]


def test_a_packers_batch_is_the_batch_of_its_graphs():
    graphs = all_graphs()
    packer, table = packed(graphs)
    other = NameTable()
    expected, found = SceneGraphBatch.from_graphs(graphs, other), packer.batch()
    assert list(table.names) == other.names and list(table.phrases) == list(other.phrases)
    for name, value in vars(expected).items():
        assert (np.asarray(value) == np.asarray(getattr(found, name))).all(), name


def test_phrases_are_entered_once_in_the_order_of_their_first_use():
    table = NameTable(["sheep", "on", "grass"])
    rows = np.array([[2, 3, 4], [2, -1, -1], [2, 3, 4], [4, 3, 2], [0, -1, -1]])
    assert table.add_phrases(rows).tolist() == [0, 1, 0, 2, 3]
    assert list(table.phrases) == ["sheep on grass", "sheep", "grass on sheep", "image"]
    assert table.add_phrases(np.array([[4, -1, -1], [2, 3, 4]])).tolist() == [4, 0]
    rng = np.random.default_rng(0)
    many = rng.integers(-1, 5, (500, 3))
    known: dict[tuple[int, ...], int] = {}
    expected = [known.setdefault(tuple(row), len(known)) for row in many.tolist()]
    assert NameTable(["a", "b", "c"]).add_phrases(many).tolist() == expected


def test_a_stored_table_finds_names_only_when_it_is_asked():
    strings = PackedStrings.of(["__image__", "__in_image__", "schaf", "gr\u00fcn", ""])
    table = NameTable(stored=strings)
    assert len(table) == 5 and table.names is strings and table._known is None
    assert "gr\u00fcn" in table and table.add("schaf") == 2 and table.add("new") == 5
    assert list(table.names) == [*strings, "new"]


@pytest.mark.parametrize("strings", [[], [""], ["a"], ["", "\u00e4\u6c34", "", "b c", "\U0001f411"]])
def test_packed_strings_are_the_strings(strings):
    found = PackedStrings.of(iter(strings))
    assert list(found) == strings and len(found) == len(strings) and found[:2] == strings[:2]
    assert not strings or found[-1] == strings[-1]
    with pytest.raises(IndexError):
        found[len(strings)]


def test_packed_rows_are_the_rows():
    rows = [np.arange(8.0).reshape(2, 4), np.empty((0, 4)), np.full((1, 4), 0.1)]
    found = PackedRows(4)
    for one in rows:
        found.append(one)
    assert len(found) == 3 and all((a == b).all() for a, b in zip(found, rows, strict=True))
    assert found[1].shape == (0, 4) and (found[-1] == 0.1).all() and len(found[0:2]) == 2


def test_mirrored_graphs_are_made_on_request():
    graphs = [SceneGraph(("a", "b"), ((0, "left of", 1),)), SceneGraph(("c",)), SceneGraph(("d",)), SceneGraph(("e",))]
    source = with_mirrored(PairSource(graphs, lambda i: np.zeros((2, 2, 3), np.uint8), "x", draws=2))
    assert list(source.graphs) == [*graphs[:2], *map(mirrored_graph, graphs[:2]), *graphs[2:],
                                   *map(mirrored_graph, graphs[2:])]  # fmt: skip
    assert source.graphs[2].relations == ((0, "right of", 1),) and source.num_images == 4
