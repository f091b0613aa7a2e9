"""The toy world's promises: pure, complete, and every relation it states is true of its boxes and masks."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from sgg_fast.config import DataConfig
from sgg_fast.data.sources import open_source
from sgg_fast.eval.relations import exchangeable
from sgg_fast.toy import world

NUM_SCENES = 1200
PIXEL = 1 / 64


@pytest.fixture(scope="module", params=["toy", "toy-rare"])
def scenes(request) -> list[world.Scene]:
    """What `--data` of that name trains on."""
    return [world.draw_scene(3, i, rare=request.param == "toy-rare" and i % 3 == 2) for i in range(NUM_SCENES)]


def test_the_training_sets_are_those_scenes(scenes, request):
    name = request.node.callspec.params["scenes"]
    source = open_source(DataConfig(source=name, num_scenes=9), seed=3)
    assert source.graphs == [scene.graph for scene in scenes[:9]]
    for i, scene in enumerate(scenes[:9]):
        np.testing.assert_array_equal(source.load_image(i), scene.image)


@pytest.fixture(scope="module")
def triples(scenes) -> dict[str, list[tuple[world.Scene, int, int]]]:
    """Predicate to every (scene, subject, object) it occurs with."""
    found: dict[str, list[tuple[world.Scene, int, int]]] = {name: [] for name in world.PREDICATES}
    for scene in scenes:
        for s, predicate, o in scene.graph.relations:
            found[predicate].append((scene, s, o))
    return found


def category(name: str) -> str:
    return name.split()[-1]


def centres(scene: world.Scene, s: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    return (scene.boxes[s, :2] + scene.boxes[s, 2:]) / 2, (scene.boxes[o, :2] + scene.boxes[o, 2:]) / 2


def touch(a: np.ndarray, b: np.ndarray, slack: float = 1.5 * PIXEL) -> bool:
    return bool((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) > -slack).all())


def test_scene_is_a_pure_function_of_seed_and_index():
    first, again = world.draw_scene(5, 11), world.draw_scene(5, 11)
    assert first.graph == again.graph
    for field in ("image", "boxes", "masks"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    for other in (world.draw_scene(5, 12), world.draw_scene(6, 11)):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize(
    ("num", "settings", "digest"),
    [
        (400, {}, "5dd0bd25dbb3a26ccbbead05438f1538acf71400e7728118f773ff6c7ba2c60a"),
        (200, {"rare": True}, "80e9f2eedf3c3c14d7eb5536ae03a7fd732adda73b704bd86531dde48076daf2"),
        (200, {"held_out": True}, "350139847395290b13c84ae31ca353b9bc88d576677b5021e0be6d9ea9e0400e"),
    ],
)
def test_the_older_world_is_the_same_to_the_bit(num, settings, digest):
    """Figures of different times compare only so. Digests of the world before `toy-words` was."""
    seen = hashlib.sha256()
    for i in range(num):
        scene = world.draw_scene(11, i, **settings)
        seen.update(repr((scene.graph.objects, scene.graph.relations)).encode())
        for array in (scene.image, scene.boxes, scene.masks):
            seen.update(array.tobytes())
    assert seen.hexdigest() == digest


@pytest.mark.parametrize("size", [32, 64, 96])
def test_shapes_and_dtypes(size):
    scene = world.draw_scene(0, 0, size=size)
    n = len(scene.graph.objects)
    assert (scene.image.dtype, scene.image.shape) == (np.uint8, (size, size, 3))
    assert (scene.boxes.dtype, scene.boxes.shape) == (np.float32, (n, 4))
    assert (scene.masks.dtype, scene.masks.shape) == (np.bool_, (n, size, size))


def test_counts_self_loops_and_repeats(scenes):
    sizes = Counter(len(scene.graph.objects) for scene in scenes)
    assert set(sizes) == set(range(3, 9))
    for scene in scenes:
        relations = scene.graph.relations
        assert 2 <= len(relations) <= 8
        assert len(set(relations)) == len(relations)
        assert all(s != o for s, _, o in relations)


def test_everything_occurs_and_is_in_the_vocabulary(scenes):
    objects = {name for scene in scenes for name in scene.graph.objects}
    predicates = {p for scene in scenes for _, p, _ in scene.graph.relations}
    assert {category(name) for name in objects} == set(world.OBJECTS)
    assert {name.split()[0] for name in objects if " " in name} == set(world.COLOURS)
    assert predicates == set(world.PREDICATES)
    assert objects | predicates == set(world.vocabulary())
    assert world.vocabulary() == sorted(set(world.vocabulary()))


def test_duplicates_with_different_colours_and_chains_occur(scenes):
    twins = chains = 0
    for scene in scenes:
        names = scene.graph.objects
        coloured = {name for name in names if " " in name}
        twins += len({category(name) for name in coloured}) < len(coloured)
        told = {(s, p) for s, p, _ in scene.graph.relations}
        riders = {s for s, p in told if p == "riding"}
        chains += any((s, "wearing") in told for s in riders)
    assert twins > 0.1 * len(scenes)
    assert chains > 0.01 * len(scenes)


def test_rare_scenes_show_what_others_hardly_do():
    """Either order of things that the evaluation turns upside down, and holding."""
    orders: Counter[tuple[frozenset[str], bool]] = Counter()
    numbers = {}
    for rare in (False, True):
        upright = holding = 0
        for i in range(400):
            graph = world.draw_scene(3, i, rare=rare).graph
            held = [p == "holding" for _, p, _ in graph.relations]
            turned = [
                (category(graph.objects[s]), p, category(graph.objects[o]))
                for s, p, o in graph.relations
                if p in ("above", "below") and exchangeable(graph.objects[s], graph.objects[o], 1)
            ]
            upright, holding = upright + any(turned), holding + any(held)
            if rare:
                for s, p, o in turned:
                    orders[frozenset((s, o)), (s if p == "above" else o) == max(s, o)] += 1
        numbers[rare] = upright / 400, holding / 400
    assert numbers[True][0] > 0.5 > 10 * numbers[False][0] and numbers[True][1] > 2 * numbers[False][1], numbers
    for kinds in {kinds for kinds, _ in orders if len(kinds) == 2}:
        both = orders[kinds, True], orders[kinds, False]
        assert min(both) >= 3 and min(both) >= 0.2 * max(both), (kinds, both)


def test_interactions_and_geometry_are_mixed(scenes, triples):
    share = sum(len(triples[p]) for p in world.GEOMETRIC) / sum(map(len, triples.values()))
    assert 0.35 < share < 0.75
    left, right = len(triples["left of"]), len(triples["right of"])
    assert abs(left - right) < 4 * np.sqrt(left + right), "direction must not be guessable"


def test_masks_are_disjoint_and_inside_their_boxes(scenes):
    for scene in scenes:
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.boxes.min() >= 0.0 and scene.boxes.max() <= 1.0
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            rows, cols = np.nonzero(mask)
            assert len(rows) >= 5
            assert box[0] * 64 <= cols.min() and cols.max() + 1 <= box[2] * 64
            assert box[1] * 64 <= rows.min() and rows.max() + 1 <= box[3] * 64


def test_masks_cover_almost_the_whole_picture(scenes):
    for scene in scenes:
        assert scene.masks.any(axis=0).mean() > 0.99


@pytest.mark.parametrize(
    ("predicate", "axis", "sign"), [("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1)]
)
def test_directions_hold_between_centres(triples, predicate, axis, sign):
    for scene, s, o in triples[predicate]:
        a, b = centres(scene, s, o)
        assert sign * (a - b)[axis] >= 0.08 - 1e-6


def test_containment_holds(triples):
    pairs = [(scene.boxes[s], scene.boxes[o]) for scene, s, o in triples["inside"]]
    pairs += [(scene.boxes[o], scene.boxes[s]) for scene, s, o in triples["surrounding"]]
    for inner, outer in pairs:
        assert (inner[:2] > outer[:2]).all() and (inner[2:] < outer[2:]).all()


def test_worn_hats_sit_on_the_upper_part(triples):
    for scene, s, o in triples["wearing"]:
        wearer, hat = scene.boxes[s], scene.boxes[o]
        assert category(scene.graph.objects[o]) == "hat"
        assert touch(wearer, hat)
        assert hat[1] < wearer[1], "the hat reaches over the head"
        assert hat[3] < wearer[1] + 0.5 * (wearer[3] - wearer[1])


def test_held_things_touch_their_holder(triples):
    for scene, s, o in triples["holding"]:
        assert touch(scene.boxes[s], scene.boxes[o])


def test_feet_are_on_the_surface(triples):
    for scene, s, o in triples["standing on"]:
        feet, surface = scene.boxes[s, 3], scene.boxes[o]
        assert surface[1] - 2 * PIXEL <= feet <= surface[3] + PIXEL


def test_riders_are_above_and_on_their_mount(triples):
    for scene, s, o in triples["riding"]:
        assert touch(scene.boxes[s], scene.boxes[o])
        assert scene.boxes[s, 3] <= scene.boxes[o, 3]


def test_what_is_behind_is_partly_hidden(triples):
    """Inside the front thing's visible pixels lies part of the back thing's box, and its mask gives way there."""
    for scene, s, o in triples["behind"]:
        x0, y0, x1, y1 = (scene.boxes[s] * 64).round().astype(int)
        window = np.zeros((64, 64), bool)
        window[y0:y1, x0:x1] = True
        assert (window & scene.masks[o]).sum() >= 3
        assert not (scene.masks[s] & scene.masks[o]).any()


def test_covers_lie_within_what_they_cover(triples):
    for scene, s, o in triples["covered in"]:
        covered, cover = scene.boxes[s], scene.boxes[o]
        assert (cover[:2] >= covered[:2] - 2 * PIXEL).all()
        assert (cover[2:] <= covered[2:] + 2 * PIXEL).all()
        assert scene.masks[o].sum() >= 5


def test_geometric_is_antisymmetric_and_declines_ties():
    rng = np.random.default_rng(0)
    opposite = dict(zip(world.GEOMETRIC, ("right of", "left of", "below", "above"), strict=False))
    opposite |= {"inside": "surrounding", "surrounding": "inside"}
    for _ in range(300):
        corners = np.sort(rng.random((2, 2, 2)), axis=1).reshape(2, 4)
        there, back = world.geometric(*corners), world.geometric(*corners[::-1])
        assert back == (opposite[there] if there else None)
    assert world.geometric(np.array([0.1, 0.1, 0.3, 0.3]), np.array([0.1, 0.1, 0.3, 0.3])) is None
