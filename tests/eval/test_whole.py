"""Whole graphs: what a fault is, whose colour is whose, and the table by how much was asked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.graphs import parse, thing, true_instances

from sgg_fast.eval import bootstrap, metrics, whole
from sgg_fast.eval.detector import Instance
from sgg_fast.graph import SceneGraph
from sgg_fast.toy import world

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
            assert metrics.score_picture(scene.graph, true_instances(scene), parse).faultless, scene.graph
