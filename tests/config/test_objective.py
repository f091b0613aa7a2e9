"""Settings of the losses: what they need of model and data, and the losses that exclude each other."""

from __future__ import annotations

import pytest

from sgg_fast.config import ConfigError, ObjectiveConfig
from sgg_fast.recipes import recipe


def test_noised_alignment_takes_no_second_weight():
    with pytest.raises(ConfigError, match="leave --isa-weight out"):
        recipe("toy", image_embedding="noised", isa_weight="alpha_bar")
    assert recipe("toy", image_embedding="noised").objective.alignment_weight == "none"
    assert recipe("toy").objective.alignment_weight == "alpha_bar"


def test_pretraining_needs_a_loss():
    assert recipe("toy", mae_weight=0.0).objective.con_weight == 1
    with pytest.raises(ConfigError, match="leave nothing to pre-train on"):
        recipe("toy", mae_weight=0.0, con_weight=0.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss_weight": 0.5}, "no X_global for image-scene alignment: leave out --loss-weight"),
        ({"geometry": 0.5}, "none of SGG-IG's own tokens for --geometry: leave it out"),
        ({"attention_loss": 0.5}, "--attention-loss: --text-form sentence has no token for each object; use phrases"),
        ({"instance_codes": True}, "none of SGG-IG's own tokens for --instance-codes: leave it out"),
        ({"relation_dropout": 0.1}, "--relation-dropout: --text-form sentence says the whole graph; use phrases"),
    ],
)
def test_a_baseline_refuses_what_it_has_no_inputs_for(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        recipe("toy", conditioner="text", **changes)
    cured = {"text_form": "phrases", **changes} if "use phrases" in reason else {}
    assert recipe("toy", conditioner="text", **cured).model.conditioner == "text"


@pytest.mark.parametrize(
    ("geometry", "attention", "needing"),
    [(0.5, 0.0, ["pretrain", "finetune"]), (0.0, 0.1, ["finetune"]), (0.0, 0.0, [])],
)
def test_boxes_are_needed_by_the_stages_whose_losses_read_them(geometry, attention, needing):
    config = ObjectiveConfig(geometry=geometry, attention_loss=attention)
    assert [stage for stage in ("pretrain", "finetune") if config.needs_boxes(stage)] == needing
