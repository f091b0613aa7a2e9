"""The toy world in everyday words: `toy-words`, the scenes of `--data toy-words`.

Beside the predicates of `sgg_fast/toy/world.py` its graphs use on, in, under, next to, near, in front of and with. Each
is a function of the visible scene, so `sgg_fast/eval/relations.py` can judge it; if several words are true of a pair,
one is drawn at random. There is more activity than in the older world: people ride every animal that carries them and
hold whatever fits a hand, and most scenes have two of a kind. The older world is unchanged, to the bit, so figures
compare.

Letters: N objects of one scene. Lengths are in picture units: 0..1, x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sgg_fast.toy.layout import Group, Plan, Thing

NEW = ("on", "in", "under", "next to", "near", "in front of", "with")
"""Predicates that the older world does not use."""
EITHER_WAY = ("next to", "near")
"""The symmetric ones: they hold in both directions."""

NAMED_OF_SKY = 0.4
"""Share of the objects in the sky, and of boats in the sea, whose graph may name this relation."""
MOUNTS = {"land": ("horse", "horse", "sheep", "sheep", "dog"), "beach": ("horse", "dog")}

BESIDE_GAP, NEAR_GAP, LEAST_SHARED = 0.1, 0.14, 0.6
"""Widest gap between two boxes that are next to each other, and near; least overlap in height of objects next to each
other, as a share of the lower one's height."""

_WAYS: dict[str, tuple[tuple[str, bool], ...]] = {
    "standing on": (("on", False),),
    "riding": (("on", False),),
    "wearing": (("with", False), ("on", True)),
    "holding": (("with", False),),
    "behind": (("in front of", True),),
    "covered in": (("on", True),),
}
"""Other words for objects that belong together, and whether subject and object change places."""


def ways(predicate: str, obj: str) -> list[tuple[str, bool]]:
    """Words for a pair with a relation of the older world to an object of the category `obj`.

    That relation comes first. Each word has a flag: whether subject and object change places.
    """
    more = (("in", False),) if (predicate, obj) == ("riding", "boat") else ()
    return [(predicate, False), *_WAYS.get(predicate, ()), *more]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Distance between the nearest points of two boxes [4]; 0 where they overlap."""
    return float(np.linalg.norm(np.maximum(np.maximum(a[:2] - b[2:], b[:2] - a[2:]), 0.0)))


def is_near(a: np.ndarray, b: np.ndarray, most: float = NEAR_GAP) -> bool:
    """Whether two boxes [4] are at most `most` apart."""
    return gap(a, b) <= most


def is_beside(a: np.ndarray, b: np.ndarray, most: float = BESIDE_GAP, shared: float = LEAST_SHARED) -> bool:
    """Whether two boxes [4] stand side by side: at one height, hardly overlapping, at most `most` apart."""
    in_common = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    lower, narrower = (min(a[k + 2] - a[k], b[k + 2] - b[k]) for k in (1, 0))
    return bool(in_common[1] >= shared * lower and -most <= in_common[0] <= 0.35 * narrower)


def is_under(a: np.ndarray, b: np.ndarray, least: float = 0.08) -> bool:
    """Whether the middle of box `a` [4] is lower than that of `b`, and one of them lies within the other's width."""
    (ax, ay), (bx, by) = ((box[:2] + box[2:]) / 2 for box in (a, b))
    return bool(ay - by >= least and (b[0] <= ax <= b[2] or a[0] <= bx <= a[2]))


def between(a: np.ndarray, b: np.ndarray, wide: bool) -> list[str]:
    """The words of `NEW` that boxes alone determine for `a` [4] and `b` [4]; `wide`: one fills the picture's width."""
    rules = {"next to": is_beside, "near": is_near, "under": is_under}
    return [] if wide else [word for word, rule in rules.items() if rule(a, b)]


class WordsPlan(Plan):
    """A scene with more relations: two of a kind, riders, held objects, and rare relations."""

    ANEW = 0.3
    HOLDERS, HOLDER_HATS = 0.65, 0.5
    HELD = ("kite", "umbrella", "ball", "hat", "bird")

    def _start(self) -> None:
        topic = self.rng.random()
        if topic < 0.35:
            self._start_pair()
        elif topic < 0.55:
            self._start_rare()
        elif topic < 0.8 and self.kind != "sea":
            self.target = max(self.target, len(self.backdrop) + 3)
            self._settle(self._rider_on_land() if self.chance(0.6) else self._holder(), "ground")

    def _fill(self) -> None:
        self._start()
        super()._fill()

    def _start_pair(self) -> None:
        """Start with two of a kind, each with what belongs to it."""
        self.target = max(self.target, len(self.backdrop) + 3)
        makers = {"land": (self._animal, self._building, self._people, self._prop),
                  "sea": (self._boats,), "beach": (self._people, self._boats, self._animal)}[self.kind]  # fmt: skip
        make = makers[self.rng.integers(len(makers))]
        zone = "sea" if make == self._boats else "ground"
        for _ in range(2):
            if self.room > 0:
                self._settle(make(), zone)

    def _settle(self, group: Group, zone: str) -> None:
        num = len(self.groups)
        super()._settle(group, zone)
        if len(self.groups) == num:
            return
        feet = {id(thing) for thing in group.feet}
        for thing in group.things if zone == "sky" else ():
            if self.chance(NAMED_OF_SKY) and thing.frame[1] + thing.frame[3] < self.horizon:
                self.links.append((thing, "in", self.backdrop[0]))
        for thing in group.things if zone == "ground" else ():
            if thing.category == "ball" and len(group.things) == 1 and id(thing) not in feet:
                self.links.append((thing, "standing on", self.backdrop[-1]))
        if zone == "sea":
            sea = next(thing for thing in self.backdrop if thing.category == "sea")
            boats = [thing for thing in group.things if thing.category == "boat" and self.chance(NAMED_OF_SKY)]
            self.links += [(boat, "in", sea) for boat in boats]

    def _rider_on_land(self) -> Group:
        return self._mounted(Thing(self.again("animal", *MOUNTS[self.kind])))

    def _people(self) -> Group:
        if self.room > 1 and self.chance(0.4):
            return self._rider_on_land()
        return self._holder() if self.room > 1 and self.chance(self.HOLDERS) else self._walker()


def draw_relations(
    rng: np.random.Generator,
    links: Sequence[tuple[int, str, int]],
    categories: Sequence[str],
    boxes: np.ndarray,
    wide: set[int],
    geometric: Callable[[np.ndarray, np.ndarray, bool], str | None],
    most: int,
    apart: bool = False,
) -> tuple[tuple[int, str, int], ...]:
    """Relations of a scene, 2 to `most` if it has as many: objects that belong together first, then random pairs.

    categories [N], boxes [N, 4]; geometric: the older world's word for two boxes, or None; apart: of the random pairs
    take those first that share no object.
    """
    num = len(boxes)
    goal = int(rng.integers(min(max(2, num - 2), 6), most + 1))
    dull = np.array([0.5 * (o in wide or s in wide) for s, _, o in links])
    first: list[int] = []
    if links:
        first = np.argsort(rng.random(len(links)) + dull)[: max(1, round(0.6 * goal))].tolist()
    chosen = [_one_way(rng, links[k], categories) for k in first]
    # A pair that belongs together is sometimes also described by position: a worn hat is above its wearer.
    related = {frozenset((s, o)) for s, _, o in links if rng.random() > 0.1}
    mentioned = {n for s, _, o in chosen for n in (s, o)}
    pairs = [(s, o) for s in range(num) for o in range(num) if s != o]
    dull_N = np.array([0.6 if n in wide else 0.3 if n in mentioned else 0.0 for n in range(num)])
    rank = rng.random(len(pairs)) + dull_N[pairs].sum(axis=1)
    ranked = [pairs[k] for k in np.argsort(rank)]
    paired = set[int]()
    for disjoint, (s, o) in [*((True, pair) for pair in ranked if apart), *((False, pair) for pair in ranked)]:
        if len(chosen) >= goal:
            break
        if frozenset((s, o)) in related or (disjoint and {s, o} & paired):
            continue
        spread = bool({s, o} & wide)
        words = between(boxes[s], boxes[o], spread)
        if (older := geometric(boxes[s], boxes[o], not spread)) is not None:
            words += [older] * 2
        if words:
            related.add(frozenset((s, o)))
            paired |= {s, o}
            chosen.append((s, words[rng.integers(len(words))], o))
    return tuple(chosen[k] for k in rng.permutation(len(chosen)))


def _one_way(rng: np.random.Generator, link: tuple[int, str, int], categories: Sequence[str]) -> tuple[int, str, int]:
    """One of the words for objects that belong together, half of the time that of the older world."""
    s, predicate, o = link
    options = ways(predicate, categories[o])
    if len(options) == 1 or rng.random() < 0.5:
        return link
    word, turned = options[1 + rng.integers(len(options) - 1)]
    return (o, word, s) if turned else (s, word, o)
