"""The spread scenes of `toy-words-spread`: single things side by side, nothing that is held out."""

from __future__ import annotations

import itertools

import pytest

from sgg_fast.data.sources import CROWD, toy_source
from sgg_fast.toy import spread, world
from sgg_fast.toy.layout import _overlap

GROUND = {*spread.LARGE, *spread.SMALL}


def spread_out(scene: world.Scene) -> int:
    """Number of things on the ground whose boxes hardly meet."""
    named = zip(scene.graph.objects, scene.boxes, strict=True)
    boxes = [box for name, box in named if name.split()[-1] in GROUND]
    apart = 0
    for num in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, num):
            if all(_overlap(a, b) < 0.2 for a, b in itertools.combinations(some, 2)):
                apart = num
    return apart


def test_most_spread_scenes_show_four_things_side_by_side():
    usual = [spread_out(world.draw_scene(5, i, spoken=True, least=CROWD)) for i in range(60)]
    wide = [spread_out(world.draw_scene(5, i, spoken=True, spread=True, least=CROWD)) for i in range(60)]
    assert sum(n >= spread.SPREAD for n in wide) > 40 > 20 > sum(n >= spread.SPREAD for n in usual)


def test_nothing_that_is_held_out_is_shown():
    scenes = [world.draw_scene(6, i, spoken=True, spread=True) for i in range(150)]
    assert not [scene for scene in scenes if world.held_out_relations(scene.graph)]


def test_every_fourth_scene_of_the_set_is_spread():
    crowded, source = toy_source(4, 12, 64, "toy-words-crowded"), toy_source(4, 12, 64, "toy-words-spread")
    for i, (graph, other) in enumerate(zip(source.graphs, crowded.graphs, strict=True)):
        if i % 4 == 1:
            other = world.draw_scene(4, i, spoken=True, spread=True, least=CROWD).graph
        assert graph == other
    with pytest.raises(ValueError, match="are of toy-words"):
        world.draw_scene(4, 0, spread=True)
    with pytest.raises(ValueError, match="mixed or spread"):
        world.draw_scene(4, 0, spoken=True, mixed=True, spread=True)
