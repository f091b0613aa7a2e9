"""Settings of the optimisation: rates and steps of each stage, and ways of updating weights that exclude each other."""

from __future__ import annotations

import pytest

from sgg_fast.config import ConfigError, OptimConfig
from sgg_fast.recipes import recipe


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "lean", "precision": "fp32"}, "--weights lean keeps weights in bf16: leave out --precision fp32"),
        ({"weights": "lean", "precision": "fp16"}, "leave out --precision fp16"),
        ({"weights": "lean", "optimizer": "adam"}, "--weights lean needs --optimizer adam8bit, .* or adafactor, not"),
        ({"weights": "split", "precision": "fp32"}, "--weights split keeps weights in bf16: leave out --precision"),
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0.0, "optimizer": "adam"},
            "needs --optimizer adam8bit, adam4bit or",
        ),
        ({"optimizer_in_backward": True}, r"excludes --max-grad-norm \(set it to 0\)$"),
        (
            {"optimizer_in_backward": True, "accumulation_steps": 2, "precision": "fp16"},
            r"excludes --max-grad-norm \(.*\) and --accumulation-steps above 1 and --precision fp16$",
        ),
        ({"cross_attention": "ours", "precision": "fp32"}, "--cross-attention ours computes in bf16 or fp16"),
        ({"attention": "cudnn", "precision": "fp32"}, "--attention cudnn computes in bf16 or fp16"),
    ],
)
def test_ways_of_updating_that_exclude_each_other_are_refused_in_one_line(changes, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        recipe("toy", **changes)
    assert "\n" not in str(caught.value)


def test_adapters_and_bf16_weights_exclude_each_other():
    with pytest.raises(
        ConfigError, match=r"--lora stores the frozen weights in --precision.*leave out --weights split"
    ):
        OptimConfig(lora=4, weights="split")


def test_each_stage_has_its_rates_and_its_steps():
    config = OptimConfig(pretrain_lr=1.0, unet_lr=2.0, graph_lr=3.0, lora_lr=4.0, pretrain_steps=5, finetune_steps=6)
    assert config.learning_rates("pretrain") == {"graph": 1.0}
    assert config.learning_rates("finetune") == {"unet": 2.0, "graph": 3.0}
    adapted = OptimConfig(lora=2, unet_lr=2.0, graph_lr=3.0, lora_lr=4.0)
    assert adapted.learning_rates("finetune") == {"unet": 4.0, "graph": 3.0}
    assert [config.num_steps(stage) for stage in ("pretrain", "finetune")] == [5, 6]


@pytest.mark.parametrize(("weights", "bf16"), [("auto", False), ("master", False), ("split", True), ("lean", True)])
def test_split_and_lean_weights_are_bf16(weights, bf16):
    assert OptimConfig(weights=weights, optimizer="adam8bit").bf16_weights is bf16
