"""Settings of a run: what early stopping and weight gradients aside need of the others."""

from __future__ import annotations

import pytest

from sgg_fast.config import ConfigError, RunConfig
from sgg_fast.recipes import recipe


def test_early_stopping_needs_validations():
    with pytest.raises(ConfigError, match=r"^--early-stop 3 needs validations: --validate-every above 0$"):
        RunConfig(early_stop=3, validate_every=0)
    assert RunConfig(early_stop=3, validate_every=5).early_stop == 3


@pytest.mark.parametrize(
    ("changes", "cures"),
    [
        ({"lora": 4, "gradient_checkpointing": True},
         "set --max-grad-norm 0 and leave out --lora and leave out --gradient-checkpointing"),
        ({"max_grad_norm": 0.0, "optimizer_in_backward": True}, "leave out --optimizer-in-backward"),
        ({}, "set --max-grad-norm 0"),
    ],
)  # fmt: skip
def test_weight_gradients_aside_need_all_activations_and_updates_behind_backward(changes, cures):
    with pytest.raises(ConfigError, match=f"^--weight-gradients aside needs .*: {cures}$"):
        recipe("toy", weight_gradients="aside", **changes)
    assert recipe("toy", **changes).run.weight_gradients == "inline"
    assert recipe("toy", weight_gradients="aside", max_grad_norm=0.0).run.weight_gradients == "aside"
