"""The baselines: tokens of each graph's own, and both kinds through the real stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_runs import same_weights, train, trainer

from sgg_fast.config import ConfigError
from sgg_fast.drawing.models import load_model
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.baseline import first_rows
from sgg_fast.nn.sgdiff import SGDiffConditioner
from sgg_fast.nn.text_baseline import TextConditioner
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation

GRAPH = SceneGraph(("sheep", "red hat", "sheep", "sun"), ((0, "wearing", 1), (0, "left of", 2)))
LONE = SceneGraph(("dog",))


def test_first_rows_are_each_graphs_own():
    batch = SceneGraphBatch.from_graphs([GRAPH, LONE], NameTable())
    rows = torch.arange(float(batch.num_relations))[:, None] + 1
    found, there = first_rows(batch, rows, 3)
    assert found[..., 0].tolist() == [[1, 2, 3], [7, 0, 0]]
    assert there.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(("pooled_dim", "null_tokens", "length"), [(0, 77, 80), (4, 8, 8)])
def test_tokens_are_padded_to_the_null_condition_and_there_is_no_x_global(pooled_dim, null_tokens, length):
    model = TextConditioner(6, 5, pooled_dim=pooled_dim, null_tokens=null_tokens)
    for num in (3, length + 1):
        tokens, mask = torch.randn(2, num, 5), torch.rand(2, num) < 0.5
        found = model.condition(tokens, mask, torch.ones(2, 4))
        assert torch.equal(found.context[:, :num], tokens) and not found.context[:, num:].any()
        assert torch.equal(found.mask[:, :num], mask) and not found.mask[:, num:].any()
        assert found.context.shape[1] == max(length, num) and torch.equal(found.x_global, torch.zeros(2, 6))
        assert torch.equal(found.pooled, torch.ones(2, 4)) if pooled_dim else found.pooled is None


def test_a_baseline_reads_names_as_they_are_and_no_text_unless_it_says_so():
    raw, table = torch.randn(3, 7), NameTable()
    assert TextConditioner(6, 5).names_of(table, raw) is raw
    assert SGDiffConditioner(6, 5, 4).read([GRAPH], table, None) is None


BASELINES = {
    "text": {"conditioner": "text", "text_form": "numbered"},
    "sgdiff": {"conditioner": "sgdiff"},
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains_and_draws_and_one_resumes(tmp_path, name):
    settings = {**BASELINES[name]}
    result = train(tmp_path / "once", "finetune", **settings)
    if name == "sgdiff":
        train(tmp_path / "twice", "finetune", **settings, finetune_steps=2)
        assert same_weights(result, train(tmp_path / "twice", "finetune", **settings))
    pipeline = load_model(str(tmp_path / "once")).pipeline
    before = toy_foundation().unet.state_dict()
    assert any(not before[k].equal(v) for k, v in pipeline.unet.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    graphs = [
        pipeline(g, 2, generator=torch.Generator().manual_seed(0), output_type="np").images for g in (GRAPH, LONE)
    ]
    assert not np.allclose(*graphs), "the graph decides"


def test_a_baselines_loss_is_the_diffusion_loss_alone(tmp_path):
    run = trainer(tmp_path, "finetune", conditioner="sgdiff")
    terms = run.engine.module(np.arange(2), 0)
    torch.testing.assert_close(terms.losses["loss"], terms.losses["diff"])
    terms.total.backward()
    missing = [k for k, p in run.conditioner.named_parameters() if p.grad is None and not k.endswith("mask_token")]
    assert not missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioner": "text", "loss_weight": 0.5}, "--conditioner text has no X_global.*leave out --loss-weight"),
        ({"conditioner": "text", "geometry": 0.5}, r"--conditioner text has none .* --geometry: leave it out"),
        ({"conditioner": "words"}, "--conditioner must be one of sgg, text, sgdiff"),
        ({"text_form": "poem"}, "--text-form must be one of sentence, phrases, numbered"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe("toy", **changes)


def test_a_baseline_has_no_pretraining(tmp_path):
    with pytest.raises(ConfigError, match="--conditioner sgdiff has no pre-training"):
        trainer(tmp_path, "pretrain", conditioner="sgdiff")
    with pytest.raises(ConfigError, match="is of SGG-IG: leave out --conditioner"):
        trainer(tmp_path, "finetune", conditioner="sgdiff", graph_encoder=tmp_path)
    assert recipe("toy").model.conditioner == "sgg"
