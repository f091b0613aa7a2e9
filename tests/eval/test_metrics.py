"""Matching and figures of the evaluation: on scenes whose things are known, and against plain counts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from support.graphs import parse, thing, true_instances

from sgg_fast.eval import metrics
from sgg_fast.eval.relations import flipped, holds
from sgg_fast.graph import SceneGraph
from sgg_fast.toy import world

NUM_SCENES = 150


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.draw_scene(41, index) for index in range(NUM_SCENES)]


def test_a_predicate_without_a_rule_is_not_judged():
    a, b = thing("dog", 0, 0, 0.2, 0.2), thing("cat", 0.5, 0, 0.7, 0.2)
    assert holds("chasing", a, b) is None
    graph = SceneGraph(("dog", "cat"), ((0, "chasing", 1), (0, "left of", 1)))
    score = metrics.score_picture(graph, [a, b], parse)
    assert score.relations == [("left of", True, True)]
    assert score.graph_iou == 1.0


def test_perfect_pictures_score_one_and_flipped_graphs_nothing(scenes):
    own = [metrics.score_picture(s.graph, true_instances(s), parse) for s in scenes]
    assert {name for name, value in metrics.summarise(own).items() if value != 1.0} == set()
    turned = [metrics.score_picture(metrics.flipped_graph(s.graph), true_instances(s), parse) for s in scenes]
    figures = metrics.summarise(turned)
    assert figures["entity recall"] == 1.0
    # Two of a kind without colours may be exchanged, so that some flips come true.
    assert figures["relations"] < 0.1
    assert figures["SG IoU"] < 0.1


def test_two_of_a_kind_are_told_apart_by_colour_then_by_relations():
    left, right = thing("hat", 0.1, 0.4, 0.3, 0.5, "blue"), thing("hat", 0.7, 0.4, 0.9, 0.5, "red")
    graph = SceneGraph(("red hat", "blue hat"), ((0, "left of", 1),))
    assert metrics.match(graph, [left, right], parse) == [right, left], "colours are worth as much, and are two"
    plain = SceneGraph(("hat", "hat"), ((0, "right of", 1),))
    assert metrics.match(plain, [left, right], parse) == [right, left]
    assert metrics.match(plain, [right, left], parse) == [right, left]
    sure = [thing("hat", 0.1, 0.4, 0.3, 0.5, sure=0.6), thing("hat", 0.7, 0.4, 0.9, 0.5, sure=0.9)]
    blind = metrics.match(SceneGraph(("hat", "dog")), sure, parse, use_relations=False)
    assert blind == [sure[1], None]


def test_matching_finds_the_best_of_all_assignments():
    """Against every assignment of everything at once, on graphs with two doubled kinds."""
    rng = np.random.default_rng(0)
    names = ("dog", "dog", "hat", "hat", "hat")
    for _ in range(30):
        corners = rng.uniform(0, 0.8, (5, 2))
        instances = [thing(name, *xy, *(xy + 0.15)) for name, xy in zip(names, corners, strict=True)]
        pairs = [(s, o) for s, o in itertools.permutations(range(5), 2) if rng.random() < 0.25]
        graph = SceneGraph(names, tuple((s, str(rng.choice(world.GEOMETRIC[:4])), o) for s, o in pairs))

        def right(chosen, graph=graph):
            return sum(bool(holds(p, chosen[s], chosen[o])) for s, p, o in graph.relations)

        best = max(
            right([*(instances[i] for i in dogs), *(instances[i] for i in hats)])
            for dogs in itertools.permutations((0, 1))
            for hats in itertools.permutations((2, 3, 4))
        )
        found = right(metrics.match(graph, instances, parse))
        assert best - 1 <= found <= best, "one kind at a time may stop one short"


def test_missing_extra_and_miscoloured_things_cost_what_they_should():
    graph = SceneGraph(("red ball", "dog", "dog", "sun"), ((1, "left of", 0), (3, "above", 0)))
    there = [
        thing("ball", 0.7, 0.6, 0.8, 0.7, "blue"),
        thing("dog", 0.1, 0.6, 0.3, 0.8),
        thing("tree", 0.4, 0.1, 0.6, 0.5),
    ]
    score = metrics.score_picture(graph, there, parse)
    assert sorted(score.found) == [False, False, True, True]
    assert score.colour_right == [False]
    assert score.counts_right == [True, False, False], "ball, dog, sun"
    assert score.relations == [("left of", True, True), ("above", False, False)]
    # Asked: red ball, dog, dog, sun. Seen: other ball, dog, tree.
    assert score.entity_iou == pytest.approx(1 / 6)
    assert (score.relation_iou, score.graph_iou) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    # As sets: {red ball, dog, sun} and {other ball, dog, tree}.
    assert score.iou_of_sets == pytest.approx((1 / 5, 1 / 2, 1 / 2))
    figures = metrics.summarise([score])
    assert figures["entity recall"] == pytest.approx(2 / 4)
    assert figures["entity precision"] == pytest.approx(2 / 3)
    assert figures["relations"] == pytest.approx(1 / 2), "mean of left of 1 and above 0"
    assert figures["relations if present"] == 1.0


def test_relations_are_averaged_over_predicates_not_over_how_often_they_are_asked():
    often = [("above", True, True)] * 8
    score = metrics.PictureScore([True], [], 1, [True], [*often, ("riding", True, False)], 1.0, 1.0, 1.0)
    assert metrics.summarise([score])["relations"] == pytest.approx(0.5)
    assert metrics.per_picture(score)["relations"] == pytest.approx(8 / 9)


def test_counterfactual_pairs_differ_in_one_free_relation(scenes):
    pairs = [pair for i, s in enumerate(scenes) for pair in metrics.counterfactual_pairs(i, s.graph)]
    assert sum(pair.axis == 0 for pair in pairs) > 20
    assert sum(pair.axis == 1 for pair in pairs) >= 1
    for pair in pairs:
        graph = scenes[pair.graph_index].graph
        assert pair.turned.objects == graph.objects
        changed = [(a, b) for a, b in zip(graph.relations, pair.turned.relations, strict=True) if a != b]
        assert changed == [(pair.relation, flipped(pair.relation))]
        names = [graph.objects[i] for i in pair.relation[::2]]
        assert all(graph.objects.count(name) == 1 for name in names)
        assert not {name.split()[-1] for name in names} & {"sky", "grass", "sea", "sand", "snow", "leaves", "flowers"}


@pytest.mark.parametrize(
    ("objects", "relations", "num"),
    [
        (("dog", "house"), ((0, "left of", 1),), 1),
        (("dog", "house", "car"), ((0, "left of", 1), (1, "left of", 2)), 1),
        (("dog", "house", "car"), ((0, "left of", 1), (0, "left of", 2), (2, "left of", 1)), 1),  # dog, car: free
        (("dog", "house", "car"), ((0, "left of", 1), (0, "left of", 2), (1, "right of", 2)), 1),
        (("dog", "hat", "car"), ((0, "wearing", 1), (1, "left of", 2), (2, "right of", 0)), 0),
        (("dog", "grass", "car"), ((0, "standing on", 1), (2, "standing on", 1), (0, "left of", 2)), 1),
        (("dog", "dog", "car"), ((0, "left of", 2),), 0),
        (("sun", "house"), ((0, "above", 1),), 0),
        (("dog", "ball"), ((0, "above", 1),), 0),
        (("red ball", "ball"), ((0, "above", 1),), 1),
        (("cloud", "bird"), ((0, "above", 1),), 1),
        (("table lamp", "shelf"), ((0, "above", 1),), 1),
        (("sky", "dog"), ((0, "above", 1),), 0),
    ],
)
def test_only_what_could_be_the_other_way_round_is_flipped(objects, relations, num):
    assert len(metrics.counterfactual_pairs(0, SceneGraph(objects, relations))) == num


def test_a_flip_that_a_chain_forbids_is_left_alone():
    graph = SceneGraph(("dog", "car", "house"), ((0, "left of", 2), (0, "left of", 1), (1, "left of", 2)))
    (pair,) = metrics.counterfactual_pairs(0, graph)
    assert pair.relation == (0, "left of", 1), "dog left of house follows from the other two"


def test_pictures_that_do_not_react_follow_in_one_half_exactly():
    graph = SceneGraph(("dog", "house"), ((0, "left of", 1),))
    (pair,) = metrics.counterfactual_pairs(0, graph)
    dog_left = [thing("dog", 0.1, 0.5, 0.3, 0.7), thing("house", 0.6, 0.4, 0.9, 0.8)]
    dog_right = [thing("dog", 0.7, 0.5, 0.9, 0.7), thing("house", 0.1, 0.4, 0.4, 0.8)]

    def follows(own, turned):
        return metrics.follows(pair, graph, own, turned, parse)

    assert follows(dog_left, dog_left) == follows(dog_right, dog_right) == 0.5
    assert follows(dog_left, dog_right) == 1.0
    assert follows(dog_right, dog_left) == 0.0
    assert math.isnan(follows(dog_left, dog_left[:1]))


def test_intersections_over_unions_by_both_definitions():
    """LAION-SG: sets, 0 for two empty ones; ours: multisets, 1 for two empty ones. Both are printed, named."""
    two_of_a_kind = SceneGraph(("dog", "dog"))
    one = metrics.score_picture(two_of_a_kind, [thing("dog", 0.1, 0.6, 0.3, 0.8)], parse)
    assert one.entity_iou == 0.5 and one.iou_of_sets[0] == 1.0, "a set cannot count"
    assert (one.relation_iou, one.graph_iou) == (1.0, 1.0) and one.iou_of_sets[1:] == (0.0, 0.0), "nothing asked"
    nothing = metrics.score_picture(two_of_a_kind, [], parse)
    assert nothing.entity_iou == nothing.iou_of_sets[0] == 0.0
    figures = metrics.summarise([one, nothing])
    assert figures["entity IoU"] == 0.25 and figures["entity IoU (sets)"] == 0.5
    assert figures["SG IoU"] == 1.0 and figures["SG IoU (sets)"] == figures["relation IoU (sets)"] == 0.0
