"""The attention loss against loops over objects and places, on the weights that diffusers itself computes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from support.cases.box import BOXES, boxed  # noqa: F401  (fixture)
from support.cases.stage import (  # noqa: F401  (fixtures)
    IDS,
    IMAGE,
    STEP,
    WIDTH,
    cache,
    draw,
    finetune_stage,
    foundation,
    given_graph,
    settings,
)

from sgg_fast.config import ConfigError
from sgg_fast.data.cache import TrainingCache
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.sgdiff import SGDiffConditioner
from sgg_fast.nn.text_baseline import TextConditioner
from sgg_fast.recipes import recipe
from sgg_fast.train.stages import FinetuneStage

WEIGHT = 0.3


def attended(stage: FinetuneStage, sample: int) -> list[torch.Tensor]:
    """[H, P, T] of every cross-attention, as diffusers' plain processor computes them for the sample alone."""
    found: list[torch.Tensor] = []
    before = stage.unet.attn_processors
    layers = [module for name, module in stage.unet.named_modules() if name.endswith(".attn2")]
    for layer in layers:
        scores = layer.get_attention_scores

        def seen(*args, scores=scores):
            found.append(scores(*args))
            return found[-1]

        layer.get_attention_scores = seen
    stage.unet.set_attn_processor(AttnProcessor())
    stage(np.array([sample]), STEP)
    stage.unet.set_attn_processor(before)
    for layer in layers:
        del layer.get_attention_scores
    assert len(found) == len(layers)
    return found


def overlap(low: float, high: float, cell: int, num: int) -> float:
    """Share of a cell of `num` that lies between `low` and `high`."""
    return max(0.0, min(high * num, cell + 1) - max(low * num, cell))


def by_loops(stage: FinetuneStage, sample: int) -> tuple[list[float], list[float]]:
    """Of each object that has a box, for one image: mean over layers, of the model and of even attention."""
    layers, given = attended(stage, sample), given_graph(stage, sample)
    losses, evens = [], []
    for i, box in enumerate(BOXES[sample].tolist()):
        x0, y0, x1, y1 = box
        if min(x1 - x0, y1 - y0) < 1e-3:
            continue
        triple, of_layers, of_even = len(given.relations) + i, [], []
        if triple >= (stage.conditioner.most_triples or math.inf):
            continue
        token = stage.conditioner.first_triple + triple
        for weights in layers:
            side = math.isqrt(weights.shape[1])
            inside = [overlap(y0, y1, r, side) * overlap(x0, x1, c, side) for r in range(side) for c in range(side)]
            each = weights[:, :, token].mean(dim=0).tolist()
            share = sum(w * a for w, a in zip(inside, each, strict=True)) / sum(each)
            of_layers.append(-math.log(max(share, 1e-4)))
            of_even.append(-math.log(max(sum(inside) / len(inside), 1e-4)))
        losses.append(sum(of_layers) / len(layers))
        evens.append(sum(of_even) / len(layers))
    return losses, evens


PHRASES = {"conditioner": "text", "text_form": "phrases", "loss_weight": 1.0}
SGDIFF = {"conditioner": "sgdiff", "loss_weight": 1.0}


def baseline_stage(boxed: TrainingCache, foundation: Foundation, **changes: object) -> FinetuneStage:
    """Fine-tuning of a baseline with the loss."""
    config = settings(**changes)
    if config.model.conditioner == "text":
        model, phrases = TextConditioner(IMAGE, 128, "phrases"), torch.randn(len(boxed.table.phrases), 128)
        boxed = dataclasses.replace(boxed, phrases=phrases)
    else:
        model = SGDiffConditioner(IMAGE, 128, width=WIDTH, trained_names=tuple(boxed.table.names))
    model.calibrate_null(torch.randn(77, 128))
    return FinetuneStage(config, model, foundation, boxed)


@pytest.mark.parametrize("own", [{}, {"relation_dropout": 0.4}, PHRASES, SGDIFF])
def test_the_share_of_attention_within_the_boxes(boxed, foundation, own):
    changes, models = {"attention_loss": WEIGHT, "context": "triples", **own}, foundation
    if "conditioner" in own:
        torch.manual_seed(0)
        stage = baseline_stage(boxed, foundation, **changes)
    else:
        stage, models = finetune_stage(boxed, foundation, **changes)
    with torch.no_grad():
        terms = stage(IDS, STEP)
        kept = [sample for sample in IDS.tolist() if draw(stage, models, sample).kept]
        assert 0 < len(kept) < len(IDS), "what was dropped has no token to attend to"
        found = [by_loops(stage, sample) for sample in kept]
        loss, even = (sum(sum(pair[k]) / max(len(pair[k]), 1) for pair in found) / len(IDS) for k in (0, 1))
        assert terms.losses["attention"].item() == pytest.approx(loss, rel=1e-3)
        assert terms.chance["attention"].item() == pytest.approx(even, rel=1e-3)
        stage.placement = None
        without = stage(IDS, STEP)
    total = without.losses["loss"].item() + WEIGHT * terms.losses["attention"].item()
    assert terms.losses["loss"].item() == pytest.approx(total, rel=1e-5)
    assert terms.losses["diff"].item() == without.losses["diff"].item(), "it only looks on"


def test_it_trains_queries_keys_and_the_graphs_tokens(boxed, foundation):
    stage, _ = finetune_stage(boxed, foundation, attention_loss=WEIGHT, loss_weight=0.0)
    with_it = stage(IDS, STEP)
    stage.zero_grad()
    with_it.total.backward()
    moved = {name for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight", "conditioner.f_global.2.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"} <= moved  # fmt: skip


def test_without_a_box_it_is_nothing(boxed, foundation):
    nowhere = dataclasses.replace(boxed, boxes=torch.full_like(boxed.boxes, 0.5))
    stage, _ = finetune_stage(nowhere, foundation, attention_loss=WEIGHT)
    terms = stage(IDS, STEP)
    assert terms.losses["attention"] == terms.chance["attention"] == 0
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in stage.parameters() if p.grad is not None)


def test_recomputed_activations_are_not_looked_at_twice(boxed, foundation):
    stage, _ = finetune_stage(boxed, foundation, attention_loss=WEIGHT)
    stage.zero_grad()
    stage(IDS, STEP).total.backward()
    expected = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    stage.unet.enable_gradient_checkpointing()
    try:
        stage.zero_grad()
        stage.unet.train()
        stage(IDS, STEP).total.backward()
    finally:
        stage.unet.disable_gradient_checkpointing()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(stage.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)


def test_what_it_cannot_go_with_is_refused():
    with pytest.raises(ConfigError, match=r"--attention-loss: .* sentence has no token for each object; use phrases"):
        recipe("toy", conditioner="text", attention_loss=0.1)
    with pytest.raises(ConfigError, match="--attention-loss must not be negative"):
        recipe("toy", attention_loss=-0.1)
