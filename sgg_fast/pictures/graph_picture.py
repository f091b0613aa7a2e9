"""Draws a scene graph: objects as boxes, relations as words on arrows. networkx places the boxes, PIL draws them.

A relation is a separate node between its two objects, so that its words have room and parallel relations do not
overlap. Letters: V boxes (objects and relations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sgg_fast.data.text_form import object_labels
from sgg_fast.graph import SceneGraph
from sgg_fast.pictures.sheets import GREY, INK, PAPER, font, text_width, wrapped

SIZE = 15
_LINE = 19
_WIDEST = 130
_MARGIN = 14
_EDGE_LENGTH = 105
_LYING = 5
"""Most boxes of a part that is rotated to lie on its long side; a longer part would make the drawing too wide."""
_THIN = 4.0
"""A part so many times as long as thick is folded."""
_ROW = 1.2
"""Distance of the rows of a folded part, in edges."""
_FILL, _EDGE = (221, 235, 250), (58, 110, 165)
Colour = tuple[int, int, int]


def draw_graph(
    graph: SceneGraph,
    within: tuple[int, int] | None = None,
    labels: Sequence[str] = (),
    fills: Sequence[Colour] = (),
) -> Image.Image:
    """The drawing, in its natural size or at most `within`. The same graph gives the same drawing.

    labels: words for the objects in place of their names; fills: colours of the objects, dark enough for white words.
    """
    labels = labels or object_labels(graph)
    texts = [wrapped(label, _WIDEST, SIZE) for label in (*labels, *(p for _, p, _ in graph.relations))]
    num = len(graph.objects)
    sizes_V2 = np.array([_extent(lines, is_object=i < num) for i, lines in enumerate(texts)], dtype=float)
    centres_V2 = _place(graph, sizes_V2, within[0] / within[1] if within else 1.2)
    if within:
        centres_V2 = _squeezed(centres_V2, sizes_V2, np.array(within))
    extent = (centres_V2 + sizes_V2 / 2).max(axis=0) + _MARGIN
    image = Image.new("RGB", (math.ceil(extent[0]), math.ceil(extent[1])), PAPER)
    draw = ImageDraw.Draw(image)
    for e, (subject, _, obj) in enumerate(graph.relations):
        word = num + e
        draw.line([*map(tuple, (_rim(centres_V2, sizes_V2, subject, word), centres_V2[word]))], fill=GREY, width=2)
        _arrow(draw, centres_V2[word], _rim(centres_V2, sizes_V2, obj, word))
    for i in reversed(range(len(texts))):  # objects last, on top
        fill = fills[i] if i < min(num, len(fills)) else None
        _box(draw, centres_V2[i], sizes_V2[i], texts[i], i < num, fill)
    if within and (image.width > within[0] or image.height > within[1]):
        return ImageOps.contain(image, within, Image.Resampling.LANCZOS)
    return image


def _extent(lines: list[str], is_object: bool) -> tuple[int, int]:
    """Width and height of a box around its words."""
    across, down = (20, 12) if is_object else (8, 2)
    return max(text_width(line, SIZE) for line in lines) + across, _LINE * len(lines) + down


def _box(
    draw: ImageDraw.ImageDraw, centre: np.ndarray, size: np.ndarray, lines: list[str], is_object: bool,
    fill: Colour | None,
) -> None:  # fmt: skip
    corners, ink = [*(centre - size / 2), *(centre + size / 2)], INK if is_object else (150, 60, 30)
    if fill:
        draw.rounded_rectangle(corners, radius=8, fill=fill)
        ink = PAPER
    elif is_object:
        draw.rounded_rectangle(corners, radius=8, fill=_FILL, outline=_EDGE, width=2)
    else:
        draw.rectangle(corners, fill=PAPER)
    top = centre[1] - _LINE * len(lines) / 2
    for k, line in enumerate(lines):
        at = centre[0] - text_width(line, SIZE) / 2, top + k * _LINE
        draw.text(at, line, font=font(SIZE), fill=ink)


def _rim(centres: np.ndarray, sizes: np.ndarray, box: int, towards: int) -> np.ndarray:
    """The point where the line from the centre of `box` to the centre of `towards` leaves `box`."""
    way = centres[towards] - centres[box]
    half = sizes[box] / 2 + 2
    with np.errstate(divide="ignore"):
        share = np.min(half / np.maximum(np.abs(way), 1e-9))
    return centres[box] + way * min(share, 1.0)


def _arrow(draw: ImageDraw.ImageDraw, start: np.ndarray, tip: np.ndarray) -> None:
    way = tip - start
    length = max(float(np.hypot(*way)), 1e-9)
    along = way / length
    across = np.array([-along[1], along[0]])
    draw.line([tuple(start), tuple(tip - along * min(8, length))], fill=GREY, width=2)
    draw.polygon([tuple(tip), tuple(tip - along * 11 + across * 5), tuple(tip - along * 11 - across * 5)], fill=GREY)


def _place(graph: SceneGraph, sizes_V2: np.ndarray, shape: float) -> np.ndarray:
    """Centres [V, 2] in pixels. Each connected part is placed separately; parts fill rows, largest first."""
    import networkx

    num = len(graph.objects)
    whole = networkx.Graph()
    whole.add_nodes_from(range(len(sizes_V2)))
    for e, (subject, _, obj) in enumerate(graph.relations):
        whole.add_edges_from([(subject, num + e), (num + e, obj)])
    parts = sorted((sorted(part) for part in networkx.connected_components(whole)), key=lambda part: (-len(part), part))
    placed = [_part(whole.subgraph(part), part, sizes_V2[part]) for part in parts]
    extents = [(c + s / 2).max(axis=0) for c, s in zip(placed, (sizes_V2[part] for part in parts), strict=True)]
    area = sum((w + 2 * _MARGIN) * (h + 2 * _MARGIN) for w, h in extents)
    row = max(math.sqrt(area * shape), max(w for w, _ in extents) + _MARGIN)
    centres, x, y, shelf = np.zeros_like(sizes_V2), float(_MARGIN), float(_MARGIN), 0.0
    for part, own, (w, h) in zip(parts, placed, extents, strict=True):
        if x > _MARGIN and x + w > row:
            x, y, shelf = _MARGIN, y + shelf + _MARGIN, 0.0
        centres[part] = own + np.array([x, y])
        x, shelf = x + w + _MARGIN, max(shelf, h)
    return centres


def _part(part: Any, order: list[int], sizes_V2: np.ndarray) -> np.ndarray:
    """Centres [V, 2] of one connected part; its upper left corner is at 0."""
    import networkx

    if len(order) == 1:
        return sizes_V2 / 2
    found = networkx.spring_layout(part, seed=1, iterations=300, k=1.6 / math.sqrt(len(order)))
    centres = np.array([found[node] for node in order])
    place = {node: k for k, node in enumerate(order)}
    ends = np.array([[place[a], place[b]] for a, b in part.edges])
    lengths = np.hypot(*(centres[ends[:, 0]] - centres[ends[:, 1]]).T)
    centres = (centres - centres.mean(axis=0)) / max(lengths.mean(), 1e-9)
    lying = centres @ np.linalg.svd(centres)[2].T
    long, thick = np.ptp(lying, axis=0)
    if len(order) <= _LYING:
        centres = lying
    elif long > _THIN * max(thick, 1.0):
        centres = _folded(lying)
    centres *= np.array([_EDGE_LENGTH, 0.7 * _EDGE_LENGTH])  # wider than tall, like words
    centres = _parted(centres, sizes_V2 + np.array([22, 18]))
    return centres - (centres - sizes_V2 / 2).min(axis=0)


def _folded(centres: np.ndarray) -> np.ndarray:
    """The centres [V, 2] of a part that lies along x, in rows that run right and left in turn, as tall as wide.

    The edge is the unit.
    """
    along, across = (centres - centres.min(axis=0)).T
    thick = np.ptp(across) + _ROW
    num_rows = max(2, round(math.sqrt(np.ptp(along) / thick)))
    length = np.ptp(along) / num_rows
    row = np.minimum(along // length, num_rows - 1)
    rest = along - row * length
    return np.stack([np.where(row % 2, length - rest, rest), row * thick + across], axis=1)


def _squeezed(centres: np.ndarray, sizes: np.ndarray, within: np.ndarray, rounds: int = 6) -> np.ndarray:
    """The centres, moved together until the drawing fits `within`; unchanged if the boxes need more room."""
    apart = sizes + np.array([16, 14])
    if apart.prod(axis=1).sum() > 0.6 * within.prod():
        return centres
    for _ in range(rounds):
        low, high = (centres - sizes / 2).min(axis=0), (centres + sizes / 2).max(axis=0)
        centres = centres - low + _MARGIN
        share = np.minimum(1.0, (within - 2 * _MARGIN) / (high - low))
        if share.min() == 1.0:
            break
        centres = _parted(sizes / 2 + (centres - sizes / 2) * share, apart)
    return centres - (centres - sizes / 2).min(axis=0) + _MARGIN


def _parted(centres: np.ndarray, sizes: np.ndarray, rounds: int = 400) -> np.ndarray:
    """The centres, moved apart until no two boxes overlap; each pair moves along the axis with the smaller overlap."""
    centres = centres.copy()
    for _ in range(rounds):
        way = centres[:, None] - centres[None]
        over = (sizes[:, None] + sizes[None]) / 2 - np.abs(way)
        overlaps = np.triu((over > 0.5).all(axis=-1), 1)
        if not overlaps.any():
            break
        for i, j in zip(*np.nonzero(overlaps), strict=True):
            axis = int(over[i, j, 1] < over[i, j, 0])
            sign = 1.0 if centres[i, axis] >= centres[j, axis] else -1.0
            push = ((sizes[i, axis] + sizes[j, axis]) / 2 - abs(centres[i, axis] - centres[j, axis])) / 2
            if push > 0:
                centres[i, axis] += sign * push
                centres[j, axis] -= sign * push
    return centres
