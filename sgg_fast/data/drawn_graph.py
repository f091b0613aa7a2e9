"""A scene graph as a drawing: objects on a ring, relations as arrows with their predicate. For people to look at."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sgg_fast.graph import SceneGraph

INK = (40, 40, 48)
SMALL, NORMAL = 12, 14
_LINE = (150, 150, 160)
_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 140, 44), (148, 103, 189), (200, 100, 10), (23, 150, 165),
            (190, 60, 140), (110, 85, 60), (90, 100, 30), (70, 70, 160), (130, 30, 60), (80, 80, 80))  # fmt: skip
_TRIES = 300
_ROOM = 120
"""Pixels between two objects that an arrow with its word needs."""
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def colour_of(k: int) -> tuple[int, int, int]:
    """Colour of object k, the same on picture and graph; dark enough for white text."""
    return _COLOURS[k % len(_COLOURS)]


@functools.cache
def font(size: int = NORMAL) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def draw_graph(graph: SceneGraph, size: tuple[int, int]) -> Image.Image:
    """RGB picture of `size`; the same graph gives the same picture."""
    page = Image.new("RGB", size, (248, 248, 250))
    draw = ImageDraw.Draw(page)
    num = len(graph.objects)
    labels = [f"{k} {name}" for k, name in enumerate(graph.objects)]
    widths = [draw.textlength(label, font(SMALL)) + 12 for label in labels]
    edges: dict[tuple[int, int], list[str]] = {}
    for s, predicate, o in graph.relations:
        edges.setdefault((s, o), []).append(predicate)
    related = sorted({end for pair in edges for end in pair})
    places, top = _in_rows([k for k in range(num) if k not in related], widths, size)
    slots = _ring(len(related), (size[0], top), max([widths[k] for k in related], default=0))
    rank = {k: i for i, k in enumerate(related)}
    order = _best_order(len(related), [(rank[s], rank[o]) for s, o in edges], slots)
    places |= {k: slots[order[i]] for k, i in rank.items()}
    nodes = [(x - w / 2, y - 10, x + w / 2, y + 10) for (x, y), w in ((places[k], widths[k]) for k in range(num))]
    taken: list[Box] = list(nodes)
    for s, o in edges:
        _arrow(draw, places[s], places[o], nodes[s], nodes[o], bend=(o, s) in edges)
    for (s, o), said in edges.items():
        _label(draw, ", ".join(said), places[s], places[o], taken, size, bend=(o, s) in edges)
    for k, (node, label) in enumerate(zip(nodes, labels, strict=True)):
        draw.rounded_rectangle(node, 8, fill=colour_of(k))
        draw.text((places[k][0], places[k][1]), label, "white", font(SMALL), anchor="mm")
    return page


def _in_rows(lonely: Sequence[int], widths: Sequence[float], size: tuple[int, int]) -> tuple[dict[int, Point], int]:
    """Places of objects without a relation, in rows at the bottom, and how much height is left above them."""
    rows: list[list[int]] = []
    left = 0.0
    for k in lonely:
        if widths[k] + 6 > left:
            rows.append([])
            left = size[0] - 16.0
        rows[-1].append(k)
        left -= widths[k] + 6
    top = size[1] - 26 * len(rows)
    places = {}
    for i, row in enumerate(rows):
        x = 8.0
        for k in row:
            places[k] = x + widths[k] / 2, top + 26.0 * i + 10
            x += widths[k] + 6
    return places, max(top, 120)


def _ring(num: int, size: tuple[int, int], widest: float) -> list[Point]:
    """Places on an ellipse that leaves room for the widest name; many objects take two ellipses in turn."""
    a, b = max(40.0, (size[0] - widest) / 2 - 8), size[1] / 2 - 22
    places = []
    for k in range(num):
        angle, inner = 2 * math.pi * k / num - math.pi / 2, 0.6 if num > 14 and k % 2 else 1.0
        places.append((size[0] / 2 + inner * a * math.cos(angle), size[1] / 2 + inner * b * math.sin(angle)))
    return places


def _best_order(num: int, edges: Sequence[tuple[int, int]], slots: Sequence[Point]) -> list[int]:
    """Slot of each object: what exchanging two at a time makes best, by `_cost`; the same graph, the same order."""
    rng = np.random.default_rng(0)
    best = list(range(num))
    least = _cost(best, edges, slots)
    for _ in range(_TRIES if len(edges) > 1 else 0):
        i, j = rng.integers(num, size=2).tolist()
        order = list(best)
        order[i], order[j] = order[j], order[i]
        cost = _cost(order, edges, slots)
        if cost < least:
            best, least = order, cost
    return best


def _cost(order: Sequence[int], edges: Sequence[tuple[int, int]], slots: Sequence[Point]) -> float:
    """How hard it is to read: crossings, arrows through other objects or without room for a word, then length."""
    lines = [(slots[order[s]], slots[order[o]]) for s, o in edges]
    crossings = sum(_cross(*lines[i], *lines[j]) for i in range(len(lines)) for j in range(i))
    through = sum(_near(p, *line) for line in lines for p in slots[: len(order)] if p not in line)
    return sum(math.dist(*line) + 900 * (math.dist(*line) < _ROOM) for line in lines) + 1000 * crossings + 800 * through


def _near(p: Point, a: Point, b: Point) -> bool:
    """Whether the segment ab passes an object at p too closely; names are wider than high."""
    (ax, ay), (bx, by) = ((q[0] - p[0], 2.5 * (q[1] - p[1])) for q in (a, b))
    dx, dy = bx - ax, by - ay
    t = min(1.0, max(0.0, -(ax * dx + ay * dy) / (dx * dx + dy * dy or 1.0)))
    return math.hypot(ax + t * dx, ay + t * dy) < 42


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the segments ab and cd cross; not where they share an end."""

    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    if len({a, b, c, d}) < 4:
        return False
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _on(start: Point, stop: Point, t: float, bend: bool) -> Point:
    """Point at share t of the arrow; of two arrows between the same objects each bends to its left."""
    x, y = start[0] + t * (stop[0] - start[0]), start[1] + t * (stop[1] - start[1])
    if not bend:
        return x, y
    dx, dy = stop[0] - start[0], stop[1] - start[1]
    length = math.hypot(dx, dy) or 1.0
    rise = 4 * t * (1 - t) * min(24.0, 0.2 * length)
    return x + rise * dy / length, y - rise * dx / length


def _inside(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _arrow(draw: ImageDraw.ImageDraw, start: Point, stop: Point, own: Box, other: Box, bend: bool) -> None:
    """A line from the edge of one node to that of the other, with a head."""
    path = [_on(start, stop, k / 80, bend) for k in range(81)]
    path = [p for p in path if not _inside(p, own) and not _inside(p, other)]
    if len(path) < 2:
        return
    draw.line(path, fill=_LINE, width=2, joint="curve")
    (x0, y0), (x1, y1) = path[-2], path[-1]
    angle = math.atan2(y1 - y0, x1 - x0)
    wings = [(x1 - 9 * math.cos(angle + turn), y1 - 9 * math.sin(angle + turn)) for turn in (-0.42, 0.42)]
    draw.polygon([(x1, y1), *wings], fill=(95, 95, 105))


def _label(
    draw: ImageDraw.ImageDraw, text: str, start: Point, stop: Point, taken: list[Box], size: tuple[int, int], bend: bool
) -> None:
    """The predicate on its arrow, where nothing else is written if there is such a place."""
    width, height = draw.textlength(text, font(SMALL)) + 6, SMALL + 4
    boxes = []
    for t in (0.5, 0.42, 0.58, 0.35, 0.65, 0.28, 0.72, 0.22, 0.78):
        x, y = _on(start, stop, t, bend)
        x = min(max(width / 2 + 1, x), size[0] - width / 2 - 1)
        boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    box = min(boxes, key=lambda b: sum(_overlap(b, other) for other in taken))
    taken.append(box)
    draw.rectangle(box, fill=(248, 248, 250))
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, INK, font(SMALL), anchor="mm")


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
