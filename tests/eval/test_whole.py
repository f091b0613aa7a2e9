"""Whole graphs: what a fault is, whose colour is whose, and the table by how much was asked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from sgg_fast.eval import bootstrap, metrics, whole
from sgg_fast.eval.detector import Instance
from sgg_fast.eval.evaluate import compare
from sgg_fast.eval.pictures import is_spoken, open_graphs
from sgg_fast.graph import SceneGraph
from sgg_fast.toy import world


def parse(name: str) -> tuple[str, str | None]:
    words = name.split()
    return words[-1], words[0] if len(words) > 1 else None


def thing(category: str, x0: float, y0: float, x1: float, y1: float, colour: str | None = None) -> Instance:
    return Instance(category, colour, np.array([x0, y0, x1, y1], np.float32), None, 1.0)


GRAPH = SceneGraph(("red ball", "dog", "blue car", "sky"), ((1, "left of", 2),))
RIGHT = [
    thing("sky", 0, 0, 1, 0.5, "blue"),
    thing("dog", 0.1, 0.6, 0.3, 0.8, "brown"),
    thing("ball", 0.4, 0.8, 0.5, 0.9, "red"),
    thing("car", 0.6, 0.6, 0.9, 0.8, "blue"),
]


def score(instances: list[Instance]) -> metrics.PictureScore:
    return metrics.score_picture(GRAPH, instances, parse)


def test_a_picture_as_asked_has_no_fault():
    assert score(RIGHT).faultless
    assert score([*RIGHT, thing("grass", 0, 0.5, 1, 1)]).faultless, "a ground that nobody named is none"


@pytest.mark.parametrize(
    ("what", "instances"),
    [
        ("a thing is missing", RIGHT[:-1]),
        ("one of them is there twice", [*RIGHT, thing("car", 0.6, 0.1, 0.9, 0.3, "blue")]),
        ("a thing that nobody named", [*RIGHT, thing("bird", 0.6, 0.1, 0.7, 0.2, "red")]),
        ("a second ground of a kind that was named", [*RIGHT, thing("sky", 0, 0.5, 1, 1)]),
        ("another colour", [*RIGHT[:-1], dataclasses.replace(RIGHT[-1], colour="green")]),
        ("the relation does not hold", [*RIGHT[:-1], thing("car", 0.0, 0.6, 0.12, 0.8, "blue")]),
    ],
)
def test_each_kind_of_fault_counts(what, instances):
    assert not score(instances).faultless, what
    assert metrics.per_picture(score(instances))["without a fault"] == 0.0
    assert metrics.summarise([score(RIGHT), score(instances)])["without a fault"] == 0.5


def test_colours_are_bound_to_their_things():
    assert score(RIGHT).bound == [True], "red ball and blue car; the dog has no colour that was asked"
    swapped = [
        *RIGHT[:2],
        dataclasses.replace(RIGHT[2], colour="blue"),
        dataclasses.replace(RIGHT[3], colour="red"),
    ]
    assert score(swapped).bound == [False]
    assert score([*RIGHT[:3], dataclasses.replace(RIGHT[3], colour=None)]).bound == [], "no colour was read"
    alike = SceneGraph(("red ball", "red car"))
    assert metrics.score_picture(alike, RIGHT, parse).bound == [], "of one colour nothing can be exchanged"
    figures = metrics.summarise([score(RIGHT), score(swapped)])
    assert figures["colours bound"] == 0.5


def test_the_table_counts_by_size_and_by_two_of_a_kind():
    graphs = [SceneGraph(("sky", "red dog", "white dog")), SceneGraph(("sky", "dog", "cat", "sun", "sea")), GRAPH]
    values = np.array([[0, 1, 1], [0, 0, 1]], float)
    table = whole.faultless_table(graphs, values, parse)
    assert {name: (cell["graphs"], cell["share"]) for name, cell in table.items()} == {
        "all": (3, 0.5),
        "up to 4 objects": (2, 0.5),
        "5 objects": (1, 0.5),
        "two of a kind": (1, 0.0),
        "none of a kind twice": (2, 0.75),
    }
    expected = bootstrap.estimate(values)
    assert (table["all"]["low"], table["all"]["high"]) == (expected.low, expected.high)
    printed = whole.merged({"drawn": table, "real": table})
    assert printed["two of a kind"] == {"graphs": 1, "drawn": "0.000 [0.000, 0.000]", "real": "0.000 [0.000, 0.000]"}


def test_true_instances_of_both_worlds_have_no_fault():
    for spoken in (False, True):
        for i in range(60):
            scene = world.draw_scene(41, i, spoken=spoken)
            there = [
                Instance(*parse(name), box, mask, 1.0)
                for name, box, mask in zip(scene.graph.objects, scene.boxes, scene.masks, strict=True)
            ]
            assert metrics.score_picture(scene.graph, there, parse).faultless, scene.graph


def test_sets_of_both_worlds_lie_side_by_side():
    for data, held_out in (("toy", False), ("toy-words", False), ("toy-combinations", True),
                           ("toy-words-combinations", True)):  # fmt: skip
        scene = world.draw_scene(world.HELD_OUT_SEED, 1, held_out=held_out, spoken=is_spoken(data))
        graphs = open_graphs(data, 64)
        assert graphs.graph(1) == scene.graph and (graphs.image(1) == scene.image).all()
    assert open_graphs("toy-words-repeats", 64).graph(0) != open_graphs("toy-repeats", 64).graph(0)
    assert [is_spoken(name) for name in ("toy-words-repeats", "toy-repeats", "toy-wordsmith")] == [True, False, False]


def test_an_evaluation_from_before_a_figure_was_is_compared_by_the_others(tmp_path):
    pictures = {"entity recall": [[1.0, 0.5]], "without a fault": [[1.0, 0.0]]}
    now = {"data": "toy", "counterfactual pairs": {}, "per picture": pictures}
    older = {**now, "per picture": {"entity recall": [[0.5, 0.5]]}}
    (tmp_path / "eval.json").write_text(json.dumps(older))
    assert list(compare(now, tmp_path)) == ["entity recall"]
    (tmp_path / "eval.json").write_text(json.dumps(now))
    assert list(compare(now, tmp_path)) == ["entity recall", "without a fault"]
