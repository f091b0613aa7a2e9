"""`toy-words`: what it adds, and that each word is true and judged so."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from support.graphs import true_instances

from sgg_fast.commands import infer
from sgg_fast.data.sources import open_source
from sgg_fast.data.text_form import parse_text
from sgg_fast.eval.relations import flipped, holds
from sgg_fast.graph import SceneGraph
from sgg_fast.recipes import recipe
from sgg_fast.toy import layout, words, world

NUM_SCENES = 1000


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.draw_scene(3, i, spoken=True) for i in range(NUM_SCENES)]


def category(name: str) -> str:
    return name.split()[-1]


def told(scene: world.Scene) -> list[tuple[str, str, str]]:
    names = [category(name) for name in scene.graph.objects]
    return [(names[s], predicate, names[o]) for s, predicate, o in scene.graph.relations]


def test_a_scene_is_a_pure_function_and_training_draws_those_scenes(scenes):
    source = open_source(recipe("toy", data="toy-words", num_scenes=9).data, seed=3)
    assert source.graphs == [scene.graph for scene in scenes[:9]]
    for i, scene in enumerate(scenes[:9]):
        np.testing.assert_array_equal(source.load_image(i), scene.image)
        np.testing.assert_array_equal(source.boxes(i), scene.boxes)
    with pytest.raises(ValueError, match="leave out rare"):
        world.draw_scene(3, 0, rare=True, spoken=True)


def test_everything_occurs_and_is_in_the_vocabulary(scenes):
    names = {name for scene in scenes for name in scene.graph.objects}
    predicates = Counter(p for scene in scenes for _, p, _ in scene.graph.relations)
    assert {category(name) for name in names} == set(world.OBJECTS)
    assert set(predicates) == {*world.PREDICATES, *words.NEW}
    assert min(predicates.values()) >= 0.03 * NUM_SCENES, predicates
    assert names <= set(world.vocabulary(spoken=True)) > set(world.vocabulary())
    assert set(world.vocabulary(spoken=True)) - set(world.vocabulary()) == set(words.NEW)


def test_what_the_world_says_holds_and_its_opposite_does_not(scenes):
    for scene in scenes[:400]:
        instances = true_instances(scene)
        for relation in scene.graph.relations:
            s, predicate, o = relation
            assert holds(predicate, instances[s], instances[o]), (relation, scene.graph.objects)
            a, other, b = flipped(relation)
            if predicate in words.EITHER_WAY:
                assert flipped(relation) == relation and holds(predicate, instances[o], instances[s])
            else:
                assert not holds(other, instances[a], instances[b]), (relation, scene.graph.objects)


def test_a_word_is_drawn_at_random_where_several_are_true(scenes):
    """All ways to say that somebody rides, wears or holds occur, none of them rarely."""
    ride, worn, held, layer = Counter(), Counter(), Counter(), Counter()
    for scene in scenes:
        for s, p, o in told(scene):
            ride[p] += s == "person" and o in ("horse", "sheep", "dog") and p in ("riding", "on")
            worn[p] += {s, o} == {"person", "hat"} and p in ("wearing", "with", "on")
            held[p] += s == "person" and o in ("kite", "umbrella", "bird") and p in ("holding", "with")
            layer[p] += bool({s, o} & set(layout.COVERS)) and p in ("covered in", "on")
    for said, num in ((ride, 2), (worn, 3), (held, 2), (layer, 2)):
        found = {word: n for word, n in said.items() if n}
        assert len(found) == num and min(found.values()) >= 0.1 * sum(found.values()), found


def test_people_ride_what_carries_them_and_hold_what_fits_a_hand(scenes):
    triples = Counter(triple for scene in scenes for triple in told(scene))
    for mount in ("horse", "sheep", "dog", "boat"):
        assert triples["person", "riding", mount] >= 5, mount
    for thing in ("kite", "umbrella", "hat", "bird"):
        assert triples["person", "holding", thing] >= 5, thing
    assert set(layout.SEAT) >= {m for kinds in words.MOUNTS.values() for m in kinds} and set(words.WordsPlan.HELD) == {
        *layout.GRIP
    }


def test_half_of_the_scenes_have_two_of_a_kind(scenes):
    def twins(some):
        return np.mean([len(set(map(category, s.graph.objects))) < len(s.graph.objects) for s in some])

    older = [world.draw_scene(3, i) for i in range(400)]
    assert twins(scenes) > 0.45 > twins(older) + 0.1


def test_combinations_held_out_are_held_out_in_all_words(scenes):
    assert not any(world.held_out_relations(scene.graph) for scene in scenes)
    for triple in (("hat", "on", "sheep"), ("sheep", "with", "hat"), ("dog", "in", "boat"), ("person", "with", "ball"),
                   ("leaves", "on", "house"), ("bird", "on", "car")):  # fmt: skip
        assert triple in world.HELD_OUT_IN_WORDS
    asked = Counter()
    for i in range(60):
        scene = world.draw_scene(3, i, held_out=True, spoken=True)
        own = [told(scene)[k] for k in world.held_out_relations(scene.graph)]
        assert own
        asked.update(word for _, word, _ in own)
    assert {"on", "with"} & set(asked), asked


def test_places_are_functions_of_boxes():
    left, right = np.array([0.1, 0.5, 0.3, 0.8]), np.array([0.35, 0.55, 0.6, 0.8])
    assert words.is_beside(left, right) and words.is_beside(right, left) and words.is_near(left, right)
    assert not words.is_beside(left, right + np.array([0.1, 0, 0.1, 0])), "too far"
    assert not words.is_beside(left, right - np.array([0, 0.3, 0, 0.3])), "not at one height"
    assert words.is_near(left, right - np.array([0, 0.3, 0, 0.3])) and not words.is_near(left, right + 0.3)
    above = np.array([0.15, 0.1, 0.4, 0.4])
    assert words.is_under(left, above) and not words.is_under(above, left)
    assert not words.is_under(right, np.array([0.0, 0.1, 0.2, 0.3])), "beside, not under"
    assert words.gap(left, right) == pytest.approx(0.05) and words.gap(left, left) == 0.0


def test_words_and_triples_of_the_examples_are_in_the_world():
    """README, infer.py --help and graph.json: every word of theirs, and every triple by the category of its things."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [*re.findall(r'infer.py "([^"]*)"', readme), *re.findall(r'infer.py "([^"]*)"', infer.EXAMPLES)]
    texts += [found.removeprefix("add ") for found in re.findall(r"'(add [^']*)'", Path(infer.__file__).read_text())]
    shown = json.loads(readme[readme.index('{"objects"') : readme.index("}", readme.index('{"objects"')) + 1])
    contents = [shown, *json.loads((ROOT / "graph.json").read_text())]
    graphs = [parse_text(text) for text in texts]
    graphs += [SceneGraph(tuple(c["objects"]), tuple(map(tuple, c["relationships"]))) for c in contents]
    assert len(texts) >= 4
    asked = {(category(g.objects[s]), p, category(g.objects[o])) for g in graphs for s, p, o in g.relations}
    said = {name for g in graphs for name in g.objects} | {p for _, p, _ in asked}
    assert said <= set(world.vocabulary(spoken=True)) and not asked & world.HELD_OUT_IN_WORDS
    seen: set[tuple[str, str, str]] = set()
    for i in range(6000):
        seen.update(told(world.draw_scene(9, i, spoken=True)))
        if asked <= seen:
            break
    assert asked <= seen, asked - seen


def test_the_vocabulary_page_has_every_word_and_every_held_out_combination():
    page = " ".join((ROOT / "docs" / "toy.md").read_text(encoding="utf-8").split())
    lists = page.partition("## Words")[2].partition("## Combinations")[0]
    for word in (*world.OBJECTS, *world.COLOURS, *world.PREDICATES, *words.NEW):
        assert re.search(rf"\b{word}s?\b", lists), word
    held_out = page.partition("## Combinations held out")[2].partition("##")[0]
    assert held_out.count(",") >= len(world.HELD_OUT)
    for s, p, o in world.HELD_OUT:
        assert re.search(rf"a {s} {p} (a )?{o}\b", held_out), (s, p, o)
