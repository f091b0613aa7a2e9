"""Boxes of a relation's pair: targets and loss by loops, what is trained by them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support import loops
from support.cases.box import BOXES, boxed, random_boxes  # noqa: F401
from support.cases.stage import (  # noqa: F401  (fixtures)
    GRAPHS,
    IDS,
    STEP,
    cache,
    encoded,
    finetune_stage,
    foundation,
    given_graph,
    pretrain_stage,
)
from support.loops import under

WEIGHT = 0.7


def pairs(sample: int) -> dict[int, list[float]]:
    """Relation -> (dx, dy, log width ratio, log height ratio), of those whose boxes are both there.

    After the graph's own relations come those of its objects to the image, whose box is the whole picture.
    """
    found, graph = {}, GRAPHS[sample]
    ends = [(s, o) for s, _, o in graph.relations] + [(i, None) for i in range(len(graph.objects))]
    for k, (s, o) in enumerate(ends):
        sx0, sy0, sx1, sy1 = BOXES[sample][s].tolist()
        ox0, oy0, ox1, oy1 = (0, 0, 1, 1) if o is None else BOXES[sample][o].tolist()
        if min(sx1 - sx0, sy1 - sy0, ox1 - ox0, oy1 - oy0) < 1e-3:
            continue
        dx, dy = (ox0 + ox1 - sx0 - sx1) / 2, (oy0 + oy1 - sy0 - sy1) / 2
        found[k] = [dx, dy, math.log((ox1 - ox0) / (sx1 - sx0)), math.log((oy1 - oy0) / (sy1 - sy0))]
    return found


def to_image(sample: int, k: int) -> bool:
    return k >= len(GRAPHS[sample].relations)


def every(image: bool) -> np.ndarray:
    """Of all relations of one kind."""
    found = [(sample, k, row) for sample in range(len(GRAPHS)) for k, row in pairs(sample).items()]
    return np.array([row for sample, k, row in found if to_image(sample, k) == image])


EVERY = {image: every(image) for image in (False, True)}
MEAN = {image: rows.mean(axis=0) for image, rows in EVERY.items()}
STD = {image: rows.std(axis=0) for image, rows in EVERY.items()}


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def best_constants(image: bool) -> float:
    """On a grid."""
    standard, grid = (EVERY[image] - MEAN[image]) / STD[image], np.linspace(-2, 2, 2001)
    best = [min(np.mean([smooth_l1(c - t) for t in column]) for c in grid[::10]) for column in standard.T]
    return float(np.mean(best))


CONSTANTS = {image: best_constants(image) for image in (False, True)}


def by_loops(stage, ids: list[int]) -> tuple[float, float]:
    """Mean over samples and their relations of the mean smooth L1 of the head's four, and of what constants score."""
    w, of_samples, at_chance = loops.weights(stage.geometry.head), [], []
    for sample in ids:
        losses, chances = [], []
        tokens, given = encoded(stage, sample).tokens, given_graph(stage, sample)
        own = range(len(GRAPHS[sample].relations)) if given == GRAPHS[sample] else []
        for k, target in pairs(sample).items():
            image = to_image(sample, k)
            if not image and k not in own:
                continue
            token = tokens[k if not image else k - len(GRAPHS[sample].relations) + len(own)]
            hidden = loops.gelu(loops.linear(w, "1", loops.layer_norm(w, "0", token)))
            found = loops.linear(w, "3", hidden).tolist()
            missed = np.array(found) - (np.array(target) - MEAN[image]) / STD[image]
            losses.append(sum(map(smooth_l1, missed)) / 4)
            chances.append(CONSTANTS[image])
        of_samples.append(sum(losses) / max(len(losses), 1))
        at_chance.append(sum(chances) / max(len(losses), 1))
    return sum(of_samples) / len(ids), sum(at_chance) / len(ids)


def test_some_pairs_do_not_count():
    assert len(EVERY[False]) < sum(len(graph.relations) for graph in GRAPHS)
    assert len(EVERY[True]) < sum(len(graph.objects) for graph in GRAPHS)


def check(stage, terms, ids: list[int]) -> None:
    loops.jitter(stage.geometry, seed=3)
    terms = terms()
    own = {name: value.item() for name, value in terms.losses.items()}
    loss, chance = by_loops(stage, ids)
    assert own["geometry"] == pytest.approx(loss, rel=1e-3)
    assert terms.chance["geometry"].item() == pytest.approx(chance, rel=1e-3)
    stage.geometry, head = None, stage.geometry
    without = terms_of = stage(np.array(ids), STEP)
    stage.geometry = head
    assert own["loss"] == pytest.approx(without.losses["loss"].item() + WEIGHT * own["geometry"], rel=1e-5)
    chance = terms_of.chance["loss"] + WEIGHT * terms.chance["geometry"]
    assert terms.chance["loss"].item() == pytest.approx(chance.item(), rel=1e-5)


@pytest.mark.parametrize("graph_negatives", [False, True])
def test_pretraining_predicts_the_boxes_of_the_full_copies(boxed, graph_negatives):
    stage = pretrain_stage(boxed, geometry=WEIGHT, graph_negatives=graph_negatives)
    check(stage, lambda: stage(IDS, STEP), IDS.tolist())
    padded = stage(IDS, STEP, (200, 380)).losses["geometry"]
    assert padded.item() == pytest.approx(stage(IDS, STEP).losses["geometry"].item(), rel=1e-5)


def test_fine_tuning_predicts_the_boxes_of_what_it_is_given(boxed, foundation):
    stage, _ = finetune_stage(boxed, foundation, geometry=WEIGHT, relation_dropout=0.4)
    ids = np.append(IDS, len(GRAPHS) - 1)
    with torch.no_grad():
        check(stage, lambda: stage(ids, STEP), ids.tolist())


def test_a_batch_without_boxes_scores_nothing(boxed):
    nowhere = dataclasses.replace(boxed, boxes=boxed.boxes.clone())
    lonely = np.array([i for i, graph in enumerate(GRAPHS) if not graph.relations])
    rows = boxed.graphs.object_ptr
    for i in lonely:
        nowhere.boxes[rows[i] : rows[i + 1] - 1] = 0.5
    stage = pretrain_stage(nowhere, geometry=WEIGHT)
    terms = stage(lonely, STEP)
    assert terms.losses["geometry"] == terms.chance["geometry"] == 0
    terms.total.backward()
    assert not any(p.grad.any() for p in stage.geometry.parameters())


def test_it_trains_the_head_and_the_encoder_but_neither_x_globals_nor_the_others(boxed):
    stage = pretrain_stage(boxed, geometry=WEIGHT)
    stage.geometry(stage.encode(IDS, STEP).tokens, stage.encode(IDS, STEP).batch, torch.from_numpy(IDS))[0].backward()
    moved = {name for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}
    parts = {".".join(name.split(".")[:2]) for name in moved}
    assert parts >= {"conditioner.relation_encoder", "conditioner.f_global", "geometry.head"}
    assert not parts & {"conditioner.to_global", "decoder.layers", "constraint.scale"}


def test_the_head_is_trained_by_fine_tuning_and_not_saved(boxed, foundation):
    stage, _ = finetune_stage(boxed, foundation, geometry=WEIGHT)
    stage(IDS, STEP).total.backward()
    assert all(p.grad is not None for p in stage.geometry.parameters()), "DeepSpeed waits for each"
    assert not any("geometry" in name for name in stage.conditioner.state_dict())
    assert under(dict(stage.state_dict()), "geometry"), "but a checkpoint has it"
