"""The one-line form: how words become a graph, that a graph comes back from its line, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.text_form import is_predicate, parse_text, to_text
from sgg_fast.graph import SceneGraph, SceneGraphError


@pytest.mark.parametrize(
    ("text", "objects", "relations"),
    [
        ("sheep standing on grass; sky above grass; hat on sheep", ("sheep", "grass", "sky", "hat"),
         ((0, "standing on", 1), (2, "above", 1), (3, "on", 0))),
        ("boat", ("boat",), ()),
        (" big red hat ;; ", ("big red hat",), ()),
        ("sheep#1 left of sheep#2; sheep on grass", ("sheep", "sheep", "grass"), ((0, "left of", 1), (0, "on", 2))),
        ("a sheep to the left of the house", ("sheep", "house"), ((0, "left of", 1),)),
        ("hat on top of sheep", ("hat", "sheep"), ((0, "on top of", 1),)),
        ("brown dog jumping over red fence", ("brown dog", "red fence"), ((0, "jumping over", 1),)),
        ("dog chasing ball", ("dog", "ball"), ((0, "chasing", 1),)),
        ("red building behind tree", ("red building", "tree"), ((0, "behind", 1),)),
        ("glass of wine on table", ("glass of wine", "table"), ((0, "on", 1),)),
        ("leg of sheep", ("leg", "sheep"), ((0, "of", 1),)),
        ("man (hops over) fence", ("man", "fence"), ((0, "hops over", 1),)),
        ("cup on saucer (on) table", ("cup on saucer", "table"), ((0, "on", 1),)),
        ("Schaf (steht auf) Wiese\nHimmel", ("Schaf", "Wiese\nHimmel".replace("\n", " ")), ((0, "steht auf", 1),)),
        ("sheep on grass; sheep on grass", ("sheep", "grass"), ((0, "on", 1),)),
    ],
)  # fmt: skip
def test_words_become_a_graph(text, objects, relations):
    assert parse_text(text) == SceneGraph(objects, relations)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no object in ''"),
        (" ; ", "no object in ' ; '"),
        (
            "hat on sheep standing on grass",
            "more than one relation; part them by ';' or put the predicate in parentheses",
        ),
        ("on grass", "an object is missing beside 'on'"),
        ("sheep standing on", "an object is missing beside 'standing on'"),
        ("the on grass", "an object is missing beside 'on'"),
        ("sheep on sheep", "related to itself; several of one name are written sheep#1, sheep#2"),
        ("sheep#1 on sheep", "related to itself"),
        ("sheep#0", "several of one name are written sheep#1"),
        ("sheep#", "several of one name are written sheep#1"),
        ("sheep (on) the (in) grass", "one predicate in parentheses"),
        ("sheep (on grass", "one predicate in parentheses"),
        ("sheep () grass", "a name must be a non-empty string"),
        ("(on) grass", "a name must be a non-empty string"),
        ("__image__", "is added by the model itself"),
        ("a" * 201, "a name of 201 characters"),
        (";".join(f"o{i}" for i in range(5000)), "more than 4096 objects"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(SceneGraphError) as caught:
        parse_text(text, "INPUT")
    said = str(caught.value)
    assert said.startswith("INPUT: ") and message in said and "\n" not in said and len(said) < 220


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join).filter(
    lambda name: not any(word.lower() in ("a", "an", "the") for word in name.split())
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_graph_comes_back_from_its_line(data):
    objects = data.draw(st.lists(phrases, min_size=1, max_size=6))
    pairs = st.tuples(st.integers(0, len(objects) - 1), phrases, st.integers(0, len(objects) - 1))
    relations = data.draw(st.lists(pairs.filter(lambda r: r[0] != r[2]), max_size=6, unique=True))
    graph = SceneGraph(tuple(objects), tuple(relations))
    # A lone name that holds a predicate cannot be told from a relation; everything else comes back.
    try:
        again = parse_text(to_text(graph))
    except SceneGraphError:
        again = None
    lone = set(range(len(objects))) - {end for s, _, o in relations for end in (s, o)}
    if again is None or any(len(objects[i].split()) > 1 for i in lone):
        return
    assert sorted(again.objects) == sorted(objects)
    assert sorted((again.objects[s], p, again.objects[o]) for s, p, o in again.relations) == sorted(
        (objects[s], p, objects[o]) for s, p, o in relations
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*" ;#()\n12", "on ", "sheep ", "above ", "\ud800", "\x00", "é"])).map("".join))
def test_any_text_is_a_graph_or_one_clear_line(text):
    try:
        parse_text(text, "INPUT")
    except SceneGraphError as error:
        assert str(error).startswith("INPUT: ") and "\n" not in str(error) and len(str(error)) < 250


def test_a_text_file_has_a_graph_a_line(tmp_path):
    path = tmp_path / "scenes.txt"
    path.write_text("sheep on grass\n\nboat\n")
    assert load_scene_graphs(path) == [SceneGraph(("sheep", "grass"), ((0, "on", 1),)), SceneGraph(("boat",))]
    path.write_text("sheep on grass\nboat on\n")
    with pytest.raises(SceneGraphError, match=r"scenes.txt: line 2: 'boat on': an object is missing"):
        load_scene_graphs(path)


@pytest.mark.parametrize(
    ("name", "yes"),
    [("on top of", True), ("Left Of", True), ("eating", True), ("standing on", True), ("standing on a", False),
     ("sheep", False), ("king", False), ("ring", False), ("of", False), ("red hat", False)],
)  # fmt: skip
def test_names_that_read_as_predicates(name, yes):
    assert is_predicate(name) == yes
