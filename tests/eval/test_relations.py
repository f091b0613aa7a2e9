"""Rules of relations: on scenes whose things are known, and on boxes written out."""

from __future__ import annotations

from collections import Counter

import pytest
from support.graphs import thing, true_instances

from sgg_fast.eval.relations import OPPOSITE, centre, exchangeable, flipped, holds, is_ground, shown
from sgg_fast.toy import world

NUM_SCENES = 150


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.draw_scene(41, index) for index in range(NUM_SCENES)]


def test_what_the_world_says_holds_and_its_opposite_does_not(scenes):
    said = set()
    for scene in scenes:
        instances = true_instances(scene)
        for relation in scene.graph.relations:
            s, predicate, o = relation
            assert holds(predicate, instances[s], instances[o]) is True, (scene.graph.objects[s], relation)
            a, other, b = flipped(relation)
            assert not holds(other, instances[a], instances[b])
            assert shown(relation, instances[s], instances[o]) == relation
            said.add(predicate)
    assert said == set(world.PREDICATES)


def test_flipping_twice_is_nothing():
    for predicate in world.PREDICATES:
        assert flipped(flipped((0, predicate, 1))) == (0, predicate, 1)
    assert all(OPPOSITE[OPPOSITE[p]] == p for p in OPPOSITE)


def test_directions_need_a_clear_distance_along_their_axis():
    middle = thing("dog", 0.4, 0.4, 0.6, 0.6)
    assert holds("left of", thing("dog", 0.1, 0.4, 0.3, 0.6), middle)
    assert not holds("left of", thing("dog", 0.37, 0.4, 0.57, 0.6), middle), "0.03 of the picture is a matter of taste"
    assert not holds("left of", thing("dog", 0.3, 0.0, 0.5, 0.2), middle), "four times as far above as beside"
    assert holds("above", thing("dog", 0.3, 0.0, 0.5, 0.2), middle)
    assert holds("above", thing("sky", 0.0, 0.0, 1.0, 0.5), thing("sheep", 0.0, 0.7, 0.2, 0.9)), "of a sky only height"


def test_the_world_has_what_may_be_turned_in_either_order():
    """Of two kinds; two of one kind, neither named first, lie in either by themselves."""
    seen: Counter[tuple[str, str]] = Counter()
    for index in range(700):
        graph = world.draw_scene(41, index).graph
        for s, predicate, o in graph.relations:
            if predicate in ("above", "below") and exchangeable(graph.objects[s], graph.objects[o], 1):
                ends = [graph.objects[n].split()[-1] for n in ((s, o) if predicate == "above" else (o, s))]
                seen[ends[0], ends[1]] += 1
    often = [(a, b) for (a, b), num in seen.items() if a < b and num + seen[b, a] >= 4]
    assert len(often) >= 2
    assert all(0.1 <= seen[pair] / (seen[pair] + seen[pair[::-1]]) <= 0.9 for pair in often), seen


PERSON = thing("person", 0.4, 0.4, 0.6, 0.8)
HAT = thing("hat", 0.43, 0.3, 0.57, 0.45)
SKY, SEA, GRASS = (
    thing(name, 0.0, y0, 1.0, y1) for name, y0, y1 in (("sky", 0, 0.5), ("sea", 0.5, 1), ("grass", 0.5, 1))
)
BOAT, HOUSE = thing("boat", 0.1, 0.3, 0.5, 0.7), thing("house", 0.5, 0.3, 0.9, 0.7)
LEAVES = thing("leaves", 0.52, 0.32, 0.88, 0.68)


@pytest.mark.parametrize(
    ("subject", "other", "true", "false"),
    [
        (HAT, PERSON, {"on"}, {"in", "with", "wearing", "riding", "holding"}),
        (PERSON, HAT, {"wearing", "with"}, {"on", "in", "riding", "holding"}),
        (PERSON, GRASS, {"standing on", "on"}, {"in", "with", "riding"}),
        (thing("bird", 0.7, 0.2, 0.8, 0.32), HOUSE, {"standing on", "on"}, {"in", "riding"}),
        (thing("bird", 0.2, 0.1, 0.3, 0.2), SKY, {"in"}, {"riding", "with"}),
        (BOAT, SEA, {"in"}, {"riding", "with"}),
        (BOAT, SKY, set(), {"in", "on", "standing on"}),
        (thing("person", 0.16, 0.38, 0.28, 0.68), BOAT, {"riding", "on", "in"}, {"standing on", "with", "holding"}),
        (PERSON, thing("umbrella", 0.5, 0.3, 0.7, 0.62), {"holding", "with"}, {"on", "in", "wearing"}),
        (LEAVES, HOUSE, {"on"}, {"in", "standing on", "covered in"}),
        (HOUSE, LEAVES, {"covered in"}, {"on", "in", "standing on"}),
        (thing("ball", 0.6, 0.4, 0.7, 0.5), HOUSE, {"in"}, {"on", "standing on", "covered in"}),
        (GRASS, HOUSE, set(), {"on", "in", "with"}),
    ],
)
def test_a_word_holds_if_one_of_its_meanings_does(subject, other, true, false):
    """And none of those that are true holds for the same thing in a far corner of the picture."""
    assert {word for word in true | false if holds(word, subject, other)} == true
    far = thing(subject.category, *(subject.box * 0.05 + (0.95 if other.box[1] < 0.5 else 0.0)))
    assert not any(holds(word, far, other) for word in true)


def test_places_hold_between_boxes_and_a_ground_is_never_moved():
    left, right = thing("dog", 0.1, 0.5, 0.3, 0.7), thing("dog", 0.35, 0.5, 0.55, 0.7)
    below, far = thing("ball", 0.15, 0.8, 0.25, 0.9), thing("car", 0.7, 0.1, 0.9, 0.2)
    words = ("next to", "near", "under")
    assert [holds(word, left, right) for word in words] == [True, True, False]
    assert [holds(word, below, left) for word in words] == [False, True, True]
    assert not any(holds(word, left, far) for word in ("next to", "near"))
    assert holds("inside", thing("ball", 0.6, 0.4, 0.7, 0.5), HOUSE) and holds("surrounding", SKY, BOAT) is False
    assert shown((0, "left of", 1), right, left) == (0, "right of", 1) and shown((0, "left of", 1), left, left) is None
    assert centre(left.box).tolist() == pytest.approx([0.2, 0.6])
    assert [is_ground(name) for name in ("sky", "red leaves", "red hat")] == [True, True, False]
    assert not exchangeable("sky", "dog", 0)


def test_what_is_in_front_stands_lower_and_overlaps():
    car, apart = thing("car", 0.3, 0.6, 0.6, 0.8), thing("car", 0.1, 0.6, 0.4, 0.8)
    assert holds("in front of", car, HOUSE) and holds("behind", HOUSE, car)
    assert not holds("behind", car, HOUSE) and not holds("in front of", HOUSE, car)
    assert not holds("in front of", apart, HOUSE) and not holds("behind", HOUSE, apart)
