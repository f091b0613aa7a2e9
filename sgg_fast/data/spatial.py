"""Relations derived from positions (sg2im's six predicates), and mirrored words and graphs.

sg2im draws new pairs at every access, so runs see different graphs. Here the pairs are a pure function of image id and
epoch seed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

from sgg_fast.graph import SceneGraph

SPATIAL = ("left of", "right of", "above", "below", "inside", "surrounding")
"""The predicates in the order of sg2im's vocabulary, where they follow `__in_image__`."""

_SIDES = {"left": "right", "right": "left"}
_SIDE_WORDS = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def spatial_predicate(box_s: Sequence[float], box_o: Sequence[float], d: Sequence[float]) -> str:
    """sg2im's predicate of box s (x0, y0, x1, y1) to box o: one strictly inside the other, else by quadrant.

    d: x and y of the centre of s minus the centre of o, with y pointing down.
    """
    (sx0, sy0, sx1, sy1), (ox0, oy0, ox1, oy1) = box_s, box_o
    if sx0 < ox0 and sx1 > ox1 and sy0 < oy0 and sy1 > oy1:
        return "surrounding"
    if sx0 > ox0 and sx1 < ox1 and sy0 > oy0 and sy1 < oy1:
        return "inside"
    theta = math.atan2(d[1], d[0])
    if not -3 * math.pi / 4 < theta < 3 * math.pi / 4:
        return "left of"
    if theta < -math.pi / 4:
        return "above"
    return "right of" if theta < math.pi / 4 else "below"


def spatial_relations(
    image_id: int, boxes: Sequence[Sequence[float]], centres: Sequence[Sequence[float]], epoch_seed: int
) -> list[tuple[int, str, int]]:
    """sg2im's graph of an image: every object is paired with a random other object, in random order.

    boxes x0, y0, x1, y1 and centres x, y in shares of the picture (0..1). The draws are a hash of (image id, epoch
    seed, object): equal on every machine and independent of earlier draws. A repeated triple occurs once.
    """
    num = len(boxes)
    triples: dict[tuple[int, str, int], None] = {}
    for k in range(num if num > 1 else 0):
        digest = hashlib.blake2b(f"{image_id} {epoch_seed} {k}".encode(), digest_size=16).digest()
        other = int.from_bytes(digest[:8], "little") % (num - 1)
        other += other >= k
        s, o = (k, other) if digest[8] & 1 else (other, k)
        d = [centres[s][axis] - centres[o][axis] for axis in (0, 1)]
        triples[s, spatial_predicate(boxes[s], boxes[o], d), o] = None
    return list(triples)


def mirrored_words(name: str) -> str:
    """A name or predicate of the mirrored picture: the whole words "left" and "right" are swapped."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE_WORDS.sub(other, name)


def mirrored_graph(graph: SceneGraph) -> SceneGraph:
    """The graph of the mirrored picture."""
    return SceneGraph(
        tuple(map(mirrored_words, graph.objects)), tuple((s, mirrored_words(p), o) for s, p, o in graph.relations)
    )
