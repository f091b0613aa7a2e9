"""Plans of scenes: joints, groups and places, before a pixel is drawn."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from sgg_fast.toy import layout
from sgg_fast.toy.layout import GRIP, HEAD, SEAT, TOP, Group, Plan, Thing

NUM_PLANS = 300
JOINTS = {
    "wearing": lambda wearer, hat: ((hat, (0.5, 0.86)), (wearer, HEAD[wearer.sprite])),
    "holding": lambda person, held: ((held, GRIP[held.category]), (person, (1.0, 0.42))),
    "riding": lambda rider, mount: ((rider, (0.5, 0.74)), (mount, SEAT[mount.sprite])),
    "standing on": lambda bird, perch: ((bird, (0.5, 0.98)), (perch, TOP[perch.sprite])),
}
"""Predicate -> the two spots that it joins."""


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "rare"])
def plans(request) -> list[Plan]:
    return [Plan(np.random.default_rng([3, i]), rare=request.param) for i in range(NUM_PLANS)]


def point(thing: Thing, spot: tuple[float, float]) -> tuple[float, float]:
    """A spot of an object in the picture, mirrored with it."""
    (x, y, w, h), (u, v) = thing.frame, spot
    return x + (1 - u if thing.flip else u) * w, y + v * h


def box(thing: Thing) -> np.ndarray:
    x, y, w, h = thing.frame
    return np.array([x, y, x + w, y + h])


def test_things_that_belong_together_are_joined_at_their_spots(plans):
    joined = Counter()
    for plan in plans:
        for subject, predicate, other in plan.links:
            if predicate in JOINTS and other not in plan.backdrop:
                (a, own), (b, spot) = JOINTS[predicate](subject, other)
                assert point(a, own) == pytest.approx(point(b, spot)), (a.name, predicate, b.name)
                joined[predicate, a.flip] += 1
    assert set(joined) == set(itertools.product(JOINTS, (False, True))), "mirrored or not"


def test_what_stands_on_the_ground_has_its_feet_there_and_nearer_groups_are_drawn_later(plans):
    for plan in plans:
        ground = plan.shore if plan.kind == "beach" else plan.horizon
        on_ground = {
            id(s): s for s, predicate, o in plan.links if predicate == "standing on" and o is plan.backdrop[-1]
        }
        assert all(ground < box(thing)[3] <= 0.96 + 1e-9 for thing in on_ground.values())
        things = plan.things
        assert things[: len(plan.backdrop)] == plan.backdrop and len({id(thing) for thing in things}) == len(things)
        first = [next(k for k, thing in enumerate(things) if thing is group.things[0]) for _, group in plan.groups]
        far_to_near = [y for _, y in sorted(zip(first, (y for y, _ in plan.groups), strict=True))]
        assert far_to_near == sorted(far_to_near)


def test_what_is_behind_overlaps_and_what_is_above_is_higher(plans, request):
    said = Counter()
    for plan in plans:
        for subject, predicate, other in plan.links:
            a, b = box(subject), box(other)
            if predicate == "behind":
                assert (np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all()
                assert plan.things.index(subject) < plan.things.index(other)
            if predicate in ("above", "below"):
                upper, lower = (a, b) if predicate == "above" else (b, a)
                assert (upper[1] + upper[3]) < (lower[1] + lower[3])
            said[predicate] += 1
    assert said["behind"] > 10
    columns, is_rare = said["above"] + said["below"], request.node.callspec.params["plans"]
    assert columns > 0.3 * NUM_PLANS if is_rare else columns == 0
    assert abs(said["above"] - said["below"]) < 4 * columns**0.5 + 1, "either may be named"


def test_groups_lie_within_the_picture_and_hardly_overlap(plans):
    for plan in plans:
        bounds = [group.bounds() for _, group in plan.groups]
        for low_x, low_y, high_x, high_y in bounds:
            assert min(low_x, low_y) >= -1e-9 and max(high_x, high_y) <= 1 + 1e-9
        for a, b in itertools.combinations(bounds, 2):
            shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
            assert shared < 0.12 * min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
        assert plan.room >= 0 and len(plan.things) <= layout.MAX_OBJECTS


def test_colours_are_of_the_category_and_tell_two_of_a_kind_apart(plans):
    named = twins = 0
    for plan in plans:
        for category, same in itertools.groupby(sorted(plan.things, key=lambda t: t.category), lambda t: t.category):
            colours = [thing.colour for thing in same]
            assert set(colours) == {None} or set(colours) <= set(layout.COLOURED[category])
            if colours[0] and len(colours) <= len(layout.COLOURED[category]):
                assert len(set(colours)) == len(colours)
                twins += len(colours) > 1
            named += colours[0] is not None
    assert named > 0.5 * NUM_PLANS and twins > 0.1 * NUM_PLANS
    assert {cover.category for plan in plans for cover in plan.covers} == set(layout.COVERS)


def test_a_choice_is_repeated_more_often_than_by_chance():
    plan = Plan(np.random.default_rng(0))
    drawn = [plan.again("letter", "a", "b", "c") for _ in range(4000)]
    assert set(drawn) == {"a", "b", "c"}
    expected = 1 - Plan.ANEW * 2 / 3
    assert np.mean([a == b for a, b in itertools.pairwise(drawn)]) == pytest.approx(expected, abs=0.03)
    assert np.mean([plan.pick("a", "b", "c") == "a" for _ in range(4000)]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean([plan.chance(0.2) for _ in range(4000)]) == pytest.approx(0.2, abs=0.03)


def test_groups_are_moved_and_mirrored_as_a_whole():
    dog, hat = Thing("dog", colour="brown"), Thing("hat")
    width, height = layout.SIZES["dog"]
    assert dog.frame == (-width / 2, -height, width, height) and (dog.name, hat.name) == ("brown dog", "hat")
    hat.resize(0.5).attach((0.5, 1.0), dog, (1.0, 0.0))
    assert point(hat, (0.5, 1.0)) == pytest.approx((width / 2, -height))
    group = Group([dog])
    group.add(hat, (dog, "wearing", hat))
    assert group.links == [(dog, "wearing", hat)]
    before = group.bounds()
    assert before.tolist() == pytest.approx([-width / 2, -height - 0.065, width / 2 + 0.05, 0])
    group.place(0.4, 0.9, 0.5, mirror=True)
    low_x, low_y, high_x, high_y = before
    assert group.bounds().tolist() == pytest.approx(
        [0.4 - high_x / 2, 0.9 + low_y / 2, 0.4 - low_x / 2, 0.9 + high_y / 2]
    )
    assert dog.flip and hat.flip and point(hat, (0.5, 1.0)) == pytest.approx(point(dog, (1.0, 0.0)))


def test_an_overlap_is_a_share_of_the_smaller_box():
    large, small = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.9, 0.5, 1.1, 0.7])
    assert layout._overlap(large, small) == layout._overlap(small, large) == pytest.approx(0.5)
    assert layout._overlap(small, small + 1) == 0.0
