"""The toy world: seeded cartoon scenes with the graph, boxes and masks they were drawn from.

With it every claim about pictures following graphs can be rerun offline in minutes. It does not replace Visual Genome:
it has no clutter, no annotation errors and no synonyms. `sgg_fast/toy/sprites.py` has the shapes of the categories,
`sgg_fast/toy/layout.py` composes scenes, and `sgg_fast/toy/sets.py` writes files in the public formats.

Letters: N objects of one scene, H = W = size of the picture in pixels. Picture units: 0..1, y down.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from sgg_fast.graph import SceneGraph
from sgg_fast.toy import sprites, words
from sgg_fast.toy.layout import COLOURED, COVERS, PAINTS, USUAL, Plan, Thing
from sgg_fast.toy.mixed import MixedPlan
from sgg_fast.toy.spread import SpreadPlan

OBJECTS: tuple[str, ...] = (
    *("sky", "grass", "sea", "sand", "sun", "cloud", "person"),
    *COLOURED,
    *COVERS,
)
COLOURS: tuple[str, ...] = tuple(sprites.PALETTE)
GEOMETRIC = ("left of", "right of", "above", "below", "inside", "surrounding")
INTERACTIONS = ("standing on", "wearing", "holding", "riding", "behind", "covered in")
PREDICATES: tuple[str, ...] = (*GEOMETRIC, *INTERACTIONS)

TRAIN_SEED, HELD_OUT_SEED = 1000, 2000
"""World seeds of the foundation's training and of held-out scenes; no recipe trains on either seed."""

HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("dog", "riding", "boat"),
        ("sheep", "wearing", "hat"),
        ("bird", "standing on", "car"),
        ("person", "holding", "ball"),
        ("house", "covered in", "leaves"),
        ("sheep", "left of", "house"),
        ("tree", "right of", "car"),
    }
)
"""Combinations of known words that no scene shows unless requested. Parts of the shipped model are older: its CLIP and
its initial UNet (text, then 2 000 steps of SGG-IG) were trained with them; its graph encoder and all later steps were
not."""

MAX_RELATIONS = 8
MIN_VISIBLE = 0.3
"""Least visible share of an object's own extent (1)."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture and its contents.

    graph: 3-8 objects, "colour name" or "name", in random order; 2-8 relations.
    image: uint8 [H, W, 3].
    boxes: float32 [N, 4], x0 y0 x1 y1 in picture units, of each object before occlusion, clipped to the picture.
    masks: bool [N, H, W], the visible pixels; disjoint.
    """

    graph: SceneGraph
    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray


def _paint(plan: Plan, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [H, W, 3], and every object's own extent in drawing order, bool [N, H, W]."""
    rng, things = plan.rng, plan.things
    haze = np.linspace(0.0, rng.uniform(0.4, 0.9), size)[:, None, None]
    sky = np.array([116, 186, 240]) * rng.uniform(0.92, 1.04)
    canvas = Image.fromarray(np.broadcast_to((sky + (244 - sky) * haze), (size, size, 3)).astype(np.uint8))
    patches: dict[Thing, tuple[Image.Image, int, int]] = {}
    full_NHW = np.zeros((len(things), size, size), bool)
    full_NHW[0] = True
    tops = dict(zip(plan.backdrop[1:], (plan.horizon, plan.shore), strict=False))
    for n, thing in enumerate(things[1:], start=1):
        if thing in tops:
            patches[thing] = (sprites.surface(thing.category, tops[thing], size, rng), 0, 0)
        elif thing.covers is not None:
            under, col, row = patches[thing.covers]
            patches[thing] = (sprites.cover(thing.category, under, thing.covers in tops, rng), col, row)
        else:
            usual = COLOURED.get(thing.category, PAINTS)
            colour = thing.colour or USUAL.get(thing.category) or plan.pick(*usual)
            colours = sprites.tints(sprites.PALETTE[colour], rng)
            patches[thing] = sprites.paint(thing.sprite, thing.frame, thing.flip, colours, size)
        patch, col, row = patches[thing]
        small = patch.reduce(sprites.SUPERSAMPLING)
        canvas.paste(small, (col, row), small)
        alpha = Image.new("L", (size, size))
        alpha.paste(small.getchannel("A"), (col, row))
        full_NHW[n] = np.asarray(alpha) > 127
        if thing in tops:
            full_NHW[:n] &= ~full_NHW[n]
    return np.asarray(canvas), full_NHW


def _boxes(full_NHW: np.ndarray) -> np.ndarray:
    """Tight boxes of non-empty masks, bool [N, H, W] to float32 [N, 4] in picture units."""
    size = full_NHW.shape[-1]
    spans = []
    for axis in (1, 2):
        hit_NS = np.any(full_NHW, axis=axis)
        spans.append((hit_NS.argmax(axis=1), size - hit_NS[:, ::-1].argmax(axis=1)))
    (x0, x1), (y0, y1) = spans
    return (np.stack([x0, y0, x1, y1], axis=1) / size).astype(np.float32)


def geometric(a: np.ndarray, b: np.ndarray, sideways: bool = True) -> str | None:
    """The relation among sg2im's six that box `a` [4] has to `b` [4]; None if it is ambiguous.

    Containment comes first, then the direction between the centres, which must be clear: by 0.08 of the picture and a
    third longer along its axis than across. `sideways=False` allows only above and below.
    """
    if (a[:2] > b[:2]).all() and (a[2:] < b[2:]).all():
        return "inside"
    if (a[:2] < b[:2]).all() and (a[2:] > b[2:]).all():
        return "surrounding"
    dx, dy = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    if sideways and abs(dx) > max(0.08, 1.33 * abs(dy)):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > max(0.08, 1.33 * abs(dx) if sideways else 0.0):
        return "above" if dy < 0 else "below"
    return None


def _relations(
    rng: np.random.Generator, links: list[tuple[int, str, int]], boxes: np.ndarray, wide: set[int]
) -> tuple[tuple[int, str, int], ...]:
    """Interactions first, then geometric relations between random pairs, 2-8 together.

    Pairs with an object that has no relation yet go first; pairs with `wide` objects (ground, sky) go last.
    """
    goal = int(rng.integers(min(max(2, len(boxes) - 2), 6), MAX_RELATIONS + 1))
    chosen = [links[k] for k in rng.permutation(len(links))[: max(1, round(0.6 * goal))]]
    related = {frozenset((s, o)) for s, _, o in links}
    mentioned = {n for s, _, o in chosen for n in (s, o)}
    pairs = [(s, o) for s in range(len(boxes)) for o in range(len(boxes)) if s != o]
    dull_N = np.array([0.6 if n in wide else 0.3 if n in mentioned else 0.0 for n in range(len(boxes))])
    rank = rng.random(len(pairs)) + dull_N[pairs].sum(axis=1)
    for s, o in (pairs[k] for k in np.argsort(rank)):
        if len(chosen) >= goal:
            break
        predicate = geometric(boxes[s], boxes[o], sideways=not {s, o} & wide)
        if predicate and frozenset((s, o)) not in related:
            related.add(frozenset((s, o)))
            chosen.append((s, predicate, o))
    return tuple(chosen[k] for k in rng.permutation(len(chosen)))


HELD_OUT_IN_WORDS = frozenset(
    (o, word, s) if turned else (s, word, o) for s, p, o in HELD_OUT for word, turned in words.ways(p, o)
)
"""`HELD_OUT` in all the words of `toy-words`."""


def held_out_relations(graph: SceneGraph) -> list[int]:
    """Indices of the relations whose triple, colours aside, is in `HELD_OUT` or has the same meaning in other words."""
    category = [name.split()[-1] for name in graph.objects]
    return [k for k, (s, p, o) in enumerate(graph.relations) if (category[s], p, category[o]) in HELD_OUT_IN_WORDS]


def _try_scene(rng: np.random.Generator, size: int, held_out: bool, plan: Plan) -> Scene | None:
    """One attempt; None if an object is hidden, the scene has too few relations or `held_out` is not met."""
    if not plan.groups:
        return None
    if not held_out and any((s.category, p, o.category) in HELD_OUT for s, p, o in plan.links):
        return None
    image, full_NHW = _paint(plan, size)
    later_NHW = np.zeros_like(full_NHW)
    later_NHW[:-1] = np.logical_or.accumulate(full_NHW[:0:-1], axis=0)[::-1]
    seen_NHW = full_NHW & ~later_NHW
    area_N, seen_N = full_NHW.sum(axis=(1, 2)), seen_NHW.sum(axis=(1, 2))
    if (seen_N < np.maximum(5, MIN_VISIBLE * area_N)).any():
        return None
    order = rng.permutation(len(plan.things))
    place = {plan.things[n]: k for k, n in enumerate(order)}
    full_NHW, seen_NHW = full_NHW[order], seen_NHW[order]
    boxes = _boxes(full_NHW)
    links = []
    for subject, predicate, other in plan.links:
        s, o = place[subject], place[other]
        hidden = (full_NHW[s] & full_NHW[o]).sum() / full_NHW[s].sum()
        if predicate != "behind" or hidden > 0.1:
            links.append((s, predicate, o))
    wide = {place[t] for t in (*plan.backdrop, *plan.covers)}
    if isinstance(plan, words.WordsPlan):
        categories = [plan.things[n].category for n in order]
        apart = isinstance(plan, SpreadPlan)
        relations = words.draw_relations(rng, links, categories, boxes, wide, geometric, MAX_RELATIONS, apart)
    else:
        relations = _relations(rng, links, boxes, wide)
    if len(relations) < 2:
        return None
    graph = SceneGraph(tuple(plan.things[n].name for n in order), relations)
    if bool(held_out_relations(graph)) != held_out:
        return None
    return Scene(graph, image, boxes, seen_NHW)


def draw_scene(
    seed: int,
    index: int,
    size: int = 64,
    held_out: bool = False,
    rare: bool = False,
    spoken: bool = False,
    mixed: bool = False,
    spread: bool = False,
    least: int = 0,
) -> Scene:
    """Scene `index` of the world `seed`, `size` pixels wide and high; a pure function of its arguments.

    No scene holds a combination of `HELD_OUT`, but with `held_out` every graph has at least one. With `rare` a scene
    starts with a relation that is rare otherwise (`Plan`): training on some of those learns it sooner. With `spoken` it
    is a scene of `toy-words` (`sgg_fast/toy/words.py`), which has its own share of rare ones; with `mixed` as well it
    may start with things in company that is new to `toy-words` (`sgg_fast/toy/mixed.py`), and with `spread` it starts
    with single things side by side (`sgg_fast/toy/spread.py`). It holds `least` things or more.
    """
    if rare and spoken:
        raise ValueError("toy-words has its own share of rare scenes: leave out rare")
    if (mixed or spread) and not spoken:
        raise ValueError("mixed and spread scenes are of toy-words: give spoken as well")
    if mixed and spread:
        raise ValueError("a scene is mixed or spread: leave out one of them")
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    scene = None
    while scene is None or len(scene.graph.objects) < least:
        plan = (SpreadPlan if spread else MixedPlan if mixed else words.WordsPlan)(rng) if spoken else Plan(rng, rare)
        scene = _try_scene(rng, size, held_out, plan)
    return scene


def vocabulary(spoken: bool = False) -> list[str]:
    """Every object name, coloured or not, and every predicate that `draw_scene` can emit, sorted."""
    coloured = {f"{colour} {category}" for category, colours in COLOURED.items() for colour in colours}
    return sorted({*OBJECTS, *coloured, *PREDICATES, *(words.NEW if spoken else ())})
