"""Drawings of scene graphs: no box covers another one, an arrow ends at its object, words and colours are as given."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from sgg_fast.graph import SceneGraph
from sgg_fast.pictures import graph_picture as drawer
from sgg_fast.pictures.sheets import GREY


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a[:2] < b[2:]) & (b[:2] < a[2:])).all())


@pytest.mark.parametrize("seed", range(2))
def test_up_to_thirty_objects_are_drawn_without_overlap(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    pairs = {tuple(rng.choice(30, 2, replace=False).tolist()) for _ in range(40)}
    words = ("left of", "standing on", "in front of")
    graph = SceneGraph(
        tuple(rng.choice(["sheep", "old purple umbrella", "sky"], 30).tolist()),
        tuple((s, words[(s + o) % 3], o) for s, o in sorted(pairs)[:30]),
    )
    boxes, write = [], drawer._box

    def noted(draw, centre, size, *rest):
        boxes.append(np.concatenate([centre - size / 2, centre + size / 2]))
        write(draw, centre, size, *rest)

    monkeypatch.setattr(drawer, "_box", noted)
    image = drawer.draw_graph(graph)
    assert len(boxes) == 60 and not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    corners = np.array(boxes)
    assert corners.min() >= 0 and (corners[:, 2:].max(axis=0) <= image.size).all() and max(image.size) < 3000
    assert image.tobytes() == drawer.draw_graph(graph).tobytes()


def test_a_drawing_is_squeezed_into_its_place_without_overlap(monkeypatch):
    boxes, write = [], drawer._box

    def noted(draw, centre, size, *rest):
        boxes.append(np.concatenate([centre - size / 2, centre + size / 2]))
        write(draw, centre, size, *rest)

    monkeypatch.setattr(drawer, "_box", noted)
    chain = SceneGraph(tuple("abcdefgh"), tuple((k, "left of", k + 1) for k in range(7)))
    free = drawer.draw_graph(chain)
    assert max(free.size) > 420
    boxes.clear()
    image = drawer.draw_graph(chain, (420, 320))
    assert image.width <= 420 and image.height <= 320
    assert len(boxes) == 15 and not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]


def test_the_smallest_and_the_doubled_graph_are_drawn():
    alone = drawer.draw_graph(SceneGraph(("boat",)))
    assert alone.width < 120 and len(set(alone.getdata())) > 2
    double = SceneGraph(("a", "b"), ((0, "on", 1), (1, "on", 0), (0, "near", 1)))
    assert drawer.draw_graph(double).size != alone.size


def boxes_of(monkeypatch, graph: SceneGraph, **options: object) -> tuple[Image.Image, np.ndarray]:
    """The drawing, and [V, 4] left, top, right, bottom of its boxes: objects, then relations."""
    boxes, write = [], drawer._box

    def noted(draw, centre, size, *rest):
        boxes.append(np.concatenate([centre - size / 2, centre + size / 2]))
        write(draw, centre, size, *rest)

    monkeypatch.setattr(drawer, "_box", noted)
    return drawer.draw_graph(graph, **options), np.array(boxes[::-1])


@pytest.mark.parametrize("relation", [(0, "on", 1), (1, "on", 0)])
def test_an_arrow_ends_at_the_rim_of_its_object(monkeypatch, relation):
    """The head is wider than the line: more grey pixels a little before the object's box than before the subject's."""
    image, boxes = boxes_of(monkeypatch, SceneGraph(("a", "b"), (relation,)))
    grey = np.argwhere((np.asarray(image) == GREY).all(-1))[:, ::-1]
    beyond = [np.maximum(np.maximum(box[:2] - grey, grey - box[2:]), 0).max(axis=1) for box in boxes[:2]]
    near = [int(((distance > 6) & (distance <= 12)).sum()) for distance in beyond]
    subject, _, obj = relation
    assert near[obj] > 2 * near[subject] > 0, "the line leaves the subject without a head"
    assert all(distance.min() > 0 for distance in beyond), "boxes hide what lies below them"


def test_a_chain_is_folded_so_that_its_words_keep_their_size(monkeypatch):
    names = ("brown dog", "grass", "person#1", "yellow umbrella", "person#2", "blue hat", "orange kite", "sky")
    chain = SceneGraph(names, tuple((k, "standing on", k + 1) for k in range(7)))
    image, boxes = boxes_of(monkeypatch, chain, within=(440, 320))
    natural = boxes[:, 2:].max(axis=0)
    assert (natural < 1.3 * np.array(image.size)).all(), "it is drawn at nearly its natural size"
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]


def test_objects_have_the_words_and_colours_that_are_given(monkeypatch):
    graph, fill = SceneGraph(("a", "b"), ((0, "on", 1),)), (20, 90, 40)
    plain, before = boxes_of(monkeypatch, graph)
    image, boxes = boxes_of(monkeypatch, graph, labels=("a much longer name", "b"), fills=(fill,))
    widths = boxes[:, 2] - boxes[:, 0]
    assert widths[0] > 2 * (before[0, 2] - before[0, 0]) and widths[1] == before[1, 2] - before[1, 0]
    left, top, right, bottom = boxes[0].astype(int)
    filled = np.argwhere((np.asarray(image) == fill).all(-1))[:, ::-1]
    assert len(filled) > 0.5 * (right - left) * (bottom - top) and not (np.asarray(plain) == fill).all(-1).any()
    assert (filled >= boxes[0, :2] - 1).all() and (filled <= boxes[0, 2:] + 1).all(), "the other object has no colour"
