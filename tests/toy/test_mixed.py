"""The mixed scenes of `toy-words-mixed`: new company for things, nothing that is held out."""

from __future__ import annotations

import pytest

from sgg_fast.data.sources import CROWD, toy_source
from sgg_fast.toy import mixed, world
from sgg_fast.toy.layout import COVERS

VERBS = ("riding", "holding", "standing on", "wearing", "covered in")


def triples(scenes: list[world.Scene]) -> set[tuple[str, str, str]]:
    """(subject, verb, object) of the scenes' links between things, colours aside."""
    found = set()
    for scene in scenes:
        category = [name.split()[-1] for name in scene.graph.objects]
        found |= {(category[s], p, category[o]) for s, p, o in scene.graph.relations if p in VERBS}
    return found


@pytest.fixture(scope="module")
def drawn() -> list[world.Scene]:
    return [world.draw_scene(3, i, spoken=True, mixed=True) for i in range(250)]


def test_verbs_have_company_that_toy_words_keeps_from_them(drawn):
    new = triples(drawn) - triples([world.draw_scene(3, i, spoken=True) for i in range(250)])
    for verb, things in (("riding", {"sheep", "horse"}), ("standing on", {"ball", "dog", "person"})):
        assert things & {s for s, p, _ in new if p == verb}, verb
    for verb, things in (
        ("holding", set(mixed.SMALL)),
        ("wearing", {"hat"}),
        ("covered in", set(COVERS)),
    ):
        assert things & {o for _, p, o in new if p == verb}, verb
    assert {s for s, p, _ in new if p == "wearing"} & {"car", "house", "tree", "bird"}


def test_nothing_that_is_held_out_is_shown(drawn):
    assert not [scene for scene in drawn if world.held_out_relations(scene.graph)]
    made = {(s, "riding", m) for m, riders in mixed.RIDERS.items() for s in riders}
    made |= {(s, "standing on", b) for b, standers in mixed.STANDERS.items() for s in standers}
    made |= {("person", "holding", thing) for thing in mixed.SMALL}
    made |= {(thing, "wearing", "hat") for thing in mixed.WEARERS}
    made |= {(thing, "covered in", cover) for thing, covers in mixed.COVERED.items() for cover in covers}
    assert not made & world.HELD_OUT


def test_every_third_scene_of_the_set_is_mixed():
    source = toy_source(4, 6, 64, "toy-words-mixed")
    for i, graph in enumerate(source.graphs):
        assert graph == world.draw_scene(4, i, spoken=True, mixed=i % 3 == 2).graph
    with pytest.raises(ValueError, match="are of toy-words"):
        world.draw_scene(4, 0, mixed=True)


def test_every_second_scene_of_the_crowded_set_has_many_things():
    plain, crowded = toy_source(4, 24, 64, "toy-words-mixed"), toy_source(4, 24, 64, "toy-words-crowded")
    assert plain.graphs[::2] == crowded.graphs[::2]
    assert min(len(graph.objects) for graph in plain.graphs[1::2]) < CROWD
    assert min(len(graph.objects) for graph in crowded.graphs[1::2]) == CROWD
