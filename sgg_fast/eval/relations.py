"""Whether a picture shows a relation: rules on the boxes and masks of two instances.

The six geometric relations hold by half the margin that the toy world requires, so an error of one pixel in a box does
not decide. The toy's interactions are judged by the spots where its drawing joins two objects (hat and head, hand and
string); interactions of other worlds are not judged. An everyday word for these relations (on, in, with, ...) holds if
one of the relations that it may mean holds.
"""

from __future__ import annotations

import itertools

import numpy as np

from sgg_fast.eval.detector import Instance
from sgg_fast.toy import layout, words

OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "surrounding",
    "surrounding": "inside",
}
DIRECTIONAL = ("left of", "right of", "above", "below")
AXIS = {"left of": 0, "right of": 0, "above": 1, "below": 1}
"""Axis of each directional relation: 0 for x, 1 for y."""

Relation = tuple[int, str, int]

_MARGIN = 0.04
"""Least distance of the centres along the axis, in picture units."""
_SLACK = 0.03
"""How far a side may extend beyond the side that it should stay within."""
_REACH = 0.11
"""Greatest distance between two spots that should be joined."""
_WITHIN = 0.65
"""Least share of a cover's box within the covered object's box: a thin layer loses a quarter by one pixel."""
_GROUNDS = {*itertools.chain(*layout.BACKDROPS.values()), *layout.COVERS}
_WIDE = 0.9
"""Width of grounds and skies. For them only above and below are meaningful."""


def flipped(relation: Relation) -> Relation:
    """The opposite relation: "left of" for "right of", or subject and object exchanged.

    "next to" and "near" have no opposite and are unchanged.
    """
    s, predicate, o = relation
    if predicate in words.EITHER_WAY:
        return relation
    return (s, OPPOSITE[predicate], o) if predicate in OPPOSITE else (o, predicate, s)


def centre(box: np.ndarray) -> np.ndarray:
    """x, y of a box's middle."""
    return (box[:2] + box[2:]) / 2


def is_ground(name: str) -> bool:
    """Whether an object fills the picture from side to side or covers another one, so it cannot be moved."""
    return name.split()[-1] in _GROUNDS


def exchangeable(a: str, b: str, axis: int) -> bool:
    """Whether two objects may stand in either order along `axis`: no ball is above a house, nor a house below it.

    It is True for categories that the toy world does not have.
    """
    if is_ground(a) or is_ground(b):
        return False
    kinds = {name.split()[-1] for name in (a, b)}
    return axis == 0 or len(kinds) == 1 or kinds <= set(layout.ALOFT) or kinds.isdisjoint(layout.SIZES)


def holds(predicate: str, s: Instance, o: Instance) -> bool | None:
    """Whether `s` stands in the relation to `o`; None if there is no rule for it."""
    if predicate in AXIS:
        return _direction(predicate, s.box, o.box)
    if predicate == "inside":
        return _within(s.box, o.box)
    if predicate == "surrounding":
        return _within(o.box, s.box)
    if predicate in _PLACES:
        return _PLACES[predicate](s.box, o.box)
    rule = _INTERACTIONS.get(predicate)
    return None if rule is None else rule(s, o)


def shown(relation: Relation, s: Instance, o: Instance) -> Relation | None:
    """The relation that holds for the pair: this one, else its opposite, else None."""
    if holds(relation[1], s, o):
        return relation
    other = flipped(relation)
    pair = (s, o) if other[0] == relation[0] else (o, s)
    return other if holds(other[1], *pair) else None


def _direction(predicate: str, a: np.ndarray, b: np.ndarray) -> bool:
    axis, away = AXIS[predicate], centre(b) - centre(a)
    if predicate in ("right of", "below"):
        away = -away
    wide = max(a[2] - a[0], b[2] - b[0]) >= _WIDE
    return bool(away[axis] > _MARGIN and (wide or away[axis] >= abs(away[1 - axis])))


def _within(inner: np.ndarray, outer: np.ndarray) -> bool:
    smaller = np.prod(inner[2:] - inner[:2]) < np.prod(outer[2:] - outer[:2])
    return bool(smaller and (inner[:2] > outer[:2] - _SLACK).all() and (inner[2:] < outer[2:] + _SLACK).all())


def _spots(box: np.ndarray, *places: tuple[float, float]) -> np.ndarray:
    """The `places` of a box, given in its unit square, and their mirror images, [2 * places, 2]."""
    both = np.array([(u if side else 1 - u, v) for u, v in places for side in (True, False)])
    return box[:2] + both * (box[2:] - box[:2])


def _joined(a_spots: np.ndarray, b_spots: np.ndarray) -> bool:
    return bool(np.linalg.norm(a_spots[:, None] - b_spots[None], axis=-1).min() < _REACH)


def _wearing(wearer: Instance, hat: Instance) -> bool | None:
    heads = [spot for sprite, spot in layout.HEAD.items() if sprite.split()[0] == wearer.category]
    return _joined(_spots(hat.box, (0.5, 0.86)), _spots(wearer.box, *heads)) if heads else None


def _holding(person: Instance, held: Instance) -> bool | None:
    grip = layout.GRIP.get(held.category)
    return None if grip is None else _joined(_spots(held.box, grip), _spots(person.box, (1.0, 0.42)))


def _riding(rider: Instance, mount: Instance) -> bool | None:
    seat = layout.SEAT.get(mount.category)
    return None if seat is None else _joined(_spots(rider.box, (0.5, 0.74)), _spots(mount.box, seat))


def _standing(s: Instance, o: Instance) -> bool:
    """Whether the base lies on the ground, or within the other's width at the height of its carrying spot."""
    base, (x0, y0, x1, y1) = np.array([centre(s.box)[0], s.box[3]]), o.box
    if x1 - x0 >= _WIDE:
        return bool(y0 - _SLACK < base[1] < y1 + _SLACK)
    top = y0 + layout.TOP.get(o.category, (0.5, 0.0))[1] * (y1 - y0)
    return bool(abs(base[1] - top) < _REACH and x0 - _SLACK < base[0] < x1 + _SLACK)


def _behind(back: Instance, front: Instance) -> bool:
    """Whether the two overlap and the front one stands nearer, that is, lower in the picture."""
    overlap = np.minimum(back.box[2:], front.box[2:]) - np.maximum(back.box[:2], front.box[:2])
    return bool((overlap > 0.01).all() and front.box[3] > back.box[3])


def _covered(thing: Instance, cover: Instance) -> bool:
    """Whether most of the cover lies within the object and spans most of the object's width."""
    if cover.category not in layout.COVERS:
        return False
    shared = np.minimum(cover.box[2:], thing.box[2:]) - np.maximum(cover.box[:2], thing.box[:2])
    (width, height), (across, _) = cover.box[2:] - cover.box[:2], thing.box[2:] - thing.box[:2]
    share = np.prod(np.maximum(shared, 0.0)) / max(width * height, 1e-9)
    return bool(share >= _WITHIN and width > 0.6 * across)


def _on(s: Instance, o: Instance) -> bool:
    """Whether it stands or rides on the other, is worn by it, or covers it."""
    if s.category in layout.COVERS:
        return _covered(o, s)
    if s.category == "hat" and any(sprite.split()[0] == o.category for sprite in layout.HEAD):
        return bool(_wearing(o, s))
    return not is_ground(s.category) and (_standing(s, o) or bool(_riding(s, o)))


def _in(s: Instance, o: Instance) -> bool:
    """Whether it rides in a boat, its base lies in a sky or a sea, or its box lies in the box of anything else."""
    if is_ground(s.category):
        return False
    if o.category == "boat":
        return bool(_riding(s, o))
    if o.category in ("sky", "sea"):
        base = np.array([centre(s.box)[0], s.box[3]])
        return bool((base > o.box[:2] - _SLACK).all() and (base < o.box[2:] + _SLACK).all())
    return _within(s.box, o.box)


def _with(s: Instance, o: Instance) -> bool:
    return (o.category == "hat" and bool(_wearing(s, o))) or bool(_holding(s, o))


_PLACES = {
    "next to": lambda a, b: words.is_beside(a, b, words.BESIDE_GAP + _MARGIN, words.LEAST_SHARED - 0.1),
    "near": lambda a, b: words.is_near(a, b, words.NEAR_GAP + _MARGIN),
    "under": lambda a, b: words.is_under(a, b, _MARGIN),
}
"""Relations that boxes alone determine, by more than the margin of the toy world."""
_INTERACTIONS = {
    "wearing": _wearing,
    "holding": _holding,
    "riding": _riding,
    "standing on": _standing,
    "behind": _behind,
    "covered in": _covered,
    "in front of": lambda front, back: _behind(back, front),
    "on": _on,
    "in": _in,
    "with": _with,
}
