"""Edits in words: each changes what it names and nothing else, or says why it cannot be made."""

from __future__ import annotations

import pytest

from sgg_fast.data.text_form import parse_text
from sgg_fast.drawing.edit import apply_edit, edited
from sgg_fast.graph import SceneGraph, SceneGraphError

FLOCK = parse_text("sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; boat")


@pytest.mark.parametrize(
    ("edit", "after"),
    [
        ("sheep#2 -> cow", "sheep left of cow; sheep standing on grass; hat on sheep; boat"),
        ("boat -> red boat", "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; red boat"),
        ("add boat", "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; boat#1; boat#2"),
        ("add dog left of boat", "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; dog left of boat"),
        ("add hat#2 on sheep#2",
         "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; hat#2 on sheep#2; boat"),
        ("remove hat", "sheep#1 left of sheep#2; sheep standing on grass; boat"),
        ("remove sheep#1", "sheep; grass; hat; boat"),
        ("remove hat on sheep#1", "sheep#1 left of sheep#2; sheep standing on grass; hat; boat"),
        ("sheep#1 left of sheep#2 -> sheep#1 right of sheep#2",
         "sheep#1 right of sheep#2; sheep standing on grass; hat on sheep; boat"),
    ],
)  # fmt: skip
def test_an_edit_changes_what_it_names(edit, after):
    changed, wanted = apply_edit(FLOCK, edit), parse_text(after)
    assert sorted(changed.objects) == sorted(wanted.objects)
    said = [sorted((g.objects[s], p, g.objects[o]) for s, p, o in g.relations) for g in (changed, wanted)]
    assert said[0] == said[1]
    kept = [name for name in FLOCK.objects if name in changed.objects]
    places = [changed.objects.index(name) for name in kept]
    assert places == sorted(places), "what is not named keeps its order"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("remove sheep", "the graph has 2 of that name: write sheep#1, sheep#2"),
        ("cow -> dog", "the graph has no cow; it has sheep#1, sheep#2, grass, hat, boat"),
        ("sheep#3 -> cow", "the graph has no sheep#3"),
        ("hat -> hat on sheep#1", "an object becomes an object"),
        ("remove hat on grass", "the graph has no such relation"),
        ("add hat on sheep#1", "changes nothing; the graph is "),
        ("boat -> boat", "changes nothing"),
        ("paint the hat", 'write "sheep -> cow"'),
        ("remove", 'write "sheep -> cow"'),
        (" -> cow", 'write "sheep -> cow"'),
        ("boat -> hat on", "an object is missing beside 'on'"),
    ],
)
def test_an_edit_that_cannot_be_made_says_why(edit, message):
    with pytest.raises(SceneGraphError) as caught:
        apply_edit(FLOCK, edit)
    assert str(caught.value).startswith("--edit ") and message in str(caught.value)
    with pytest.raises(SceneGraphError, match="it is the only object"):
        apply_edit(SceneGraph(("boat",)), "remove boat")


def test_edits_are_made_in_order_and_a_relation_is_there_once():
    graph = parse_text("sheep on grass; hat on sheep")
    changed = edited(graph, ["sheep -> dog", "add dog on grass#2", "dog on grass#2 -> dog on grass#1"])
    assert changed.objects == ("dog", "grass", "hat", "grass")
    assert changed.relations == ((0, "on", 1), (2, "on", 0)), "what became equal is one relation"
    assert edited(graph, []) == graph
    with pytest.raises(SceneGraphError, match=r"^--edit 'sheep -> cow': the graph has no sheep; it has dog"):
        edited(graph, ["sheep -> dog", "sheep -> cow"])


def test_a_long_list_of_objects_is_cut_in_the_message():
    graph = SceneGraph(tuple(f"thing {k}" for k in range(100)))
    with pytest.raises(SceneGraphError) as caught:
        apply_edit(graph, "remove hat")
    assert str(caught.value).endswith("...") and len(str(caught.value)) < 250
