"""What is said before drawing: names that are cut, relations that contradict, words of the graph that is drawn."""

from __future__ import annotations

import types

import pytest

from sgg_fast.data.text_form import parse_text
from sgg_fast.drawing.notices import (
    contradictions,
    cut_names,
    graph_notices,
    notice_lines,
    untaught_notice,
)
from sgg_fast.graph import SceneGraph
from sgg_fast.toy.models import toy_tokenizer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x above y; x below y", ["x above y, and x below y"]),
        ("x above y; y above x", ["x above y, and y above x"]),
        ("x left of y; y right of x", []),
        ("x left of y; x above y; y below x", []),
        ("x inside y; x surrounding y", ["x inside y, and x surrounding y"]),
        ("x in front of y; y in front of x", ["x in front of y, and y in front of x"]),
        ("x#1 left of x#2; x#2 left of x#1", ["x#1 left of x#2, and x#2 left of x#1"]),
        ("x on y; y on x", []),
    ],
)
def test_contradictions_are_pairs_that_no_picture_shows(text, found):
    assert contradictions(parse_text(text)) == found


class Config(dict):
    __getattr__ = dict.__getitem__


def pipeline(token_init: str = "none"):
    config = Config(trained_names=("sheep", "grass", "above"), token_init=token_init)

    def unseen_names(graphs):
        return sorted({name for graph in graphs for name in graph.names} - set(config.trained_names))

    return types.SimpleNamespace(
        graph_tokenizer=toy_tokenizer(), tokenizer=toy_tokenizer(), graph_encoder=types.SimpleNamespace(config=config),
        unseen_names=unseen_names,
    )  # fmt: skip


def test_names_that_the_text_tower_does_not_read_to_the_end_are_told():
    long, ended = "xq" * 90, "sheep<|endoftext|>on fire"
    assert cut_names(pipeline(), SceneGraph(("sheep", "xq" * 20))) == []
    found = cut_names(pipeline(), SceneGraph(("sheep", long, ended), ((0, "above", 1),)))
    assert len(found) == 2 and "read up to token 77" in found[0] and "read up to its <|endoftext|>" in found[1]
    phrase = SceneGraph(("xq" * 20, "yz" * 20), ((0, "above", 1),))
    assert cut_names(pipeline(), phrase) == []
    assert len(cut_names(pipeline("text"), phrase)) == 1, "the phrase of three names, which the context starts from"


def test_each_matter_names_its_graph_where_there_are_several():
    a, b = SceneGraph(("sheap", "grass")), SceneGraph(("sheap", "cow"), ((0, "above", 1), (0, "below", 1)))
    assert notice_lines(pipeline(), {"g": SceneGraph(("sheep",))}) == []
    (line,) = notice_lines(pipeline(), {"g": a})
    assert line == "words that the model never saw in training: sheap (did you mean sheep?)"
    words, contradiction = notice_lines(pipeline(), {"g-0": a, "g-1": b})
    assert "cow in g-1" in words and "sheap (did you mean sheep?) in g-0, g-1" in words
    assert contradiction == "relations that contradict each other: g-1: sheap above cow, and sheap below cow"
    assert graph_notices(pipeline(), b) == [
        "never seen in training: below", "never seen in training: cow",
        "never seen in training: sheap (did you mean sheep?)",
        "contradiction: sheap above cow, and sheap below cow",
    ]  # fmt: skip


@pytest.mark.parametrize("provenance", [None, {}, {"settings": {"seed": 0}}, {"settings": {"relation_dropout": 0.1}}])
def test_relation_guidance_is_called_a_guess_only_where_training_is_known_to_lack_it(provenance):
    pipeline = types.SimpleNamespace(config={"provenance": provenance})
    assert untaught_notice(pipeline, 2.0) == "" == untaught_notice(types.SimpleNamespace(config={}), 2.0)
    pipeline.config["provenance"] = {"settings": {"relation_dropout": 0.0}}
    assert "--relation-dropout" in untaught_notice(pipeline, 2.0) and untaught_notice(pipeline, 0.0) == ""
