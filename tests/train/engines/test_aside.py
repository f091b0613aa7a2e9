"""Weight gradients aside: the bits of torch's own backward, and which layers leave theirs."""

from __future__ import annotations

import pytest
import torch
from support.cases.engine import assert_same, built, train  # noqa: F401  (fixtures)
from support.cases.stage import cache, foundation  # noqa: F401  (fixtures)
from torch import nn

from sgg_fast.config import Config, ConfigError, OptimConfig
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.aside import Aside, goes_aside

FORMS = [
    {"weights": "split", "fuse_unet": "on", "accumulation_steps": 2},
    {"weights": "split", "optimizer": "adam8bit"},
    {"weights": "master", "precision": "bf16", "fuse_unet": "on", "accumulation_steps": 2},
]


@pytest.mark.parametrize("changes", FORMS)
def test_the_bits_of_inline(built, changes):
    inline, aside = built("behind", **changes), built("behind", weight_gradients="aside", **changes)
    assert inline.aside is None and aside.aside is not None
    assert train(aside, range(5)) == train(inline, range(5))
    assert_same(aside, inline)


def test_every_layer_of_the_unet_leaves_its_weight(built):
    """Torch accumulates no gradient of a linear layer or convolution, merged ones included."""
    engine = built("behind", weights="split", fuse_unet="on", weight_gradients="aside")
    layers = [m for m in engine.module.unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    accumulated: list[torch.Tensor] = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(accumulated.append)
    train(engine, range(1))
    assert not accumulated
    assert {engine.aside._numbers[layer.weight] for layer in layers} <= engine.behind._arrived
