"""Sizes of the published models: their numbers of parameters."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sgg_fast.nn.foundation import Foundation
from sgg_fast.recipes import recipe
from sgg_fast.train.memory.blank import blank_foundation
from sgg_fast.train.memory.sizes import PUBLISHED


def blank(sizes: str) -> Foundation:
    """Models of these sizes without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return blank_foundation(dataclasses.replace(recipe("vg256").model, sizes=sizes))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_sizes_are_the_published_ones():
    made = blank("sd")
    counts = {name: count(getattr(made, name)) for name in ("unet", "vae", "text_encoder", "clip")}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "clip": 151_277_313}
    assert len(list(made.unet.parameters())) == 686


@pytest.mark.parametrize(
    ("sizes", "unet", "texts", "prediction"),
    [
        ("sd21", 865_910_724, [340_387_840], "v_prediction"),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840], "epsilon"),
    ],
)
def test_the_larger_models_have_theirs(sizes, unet, texts, prediction):
    made = blank(sizes)
    assert count(made.unet) == unet and [count(text) for text in made.text_encoders] == texts
    assert count(made.vae) == 83_653_863 and made.scheduler.config.prediction_type == prediction
    assert 8 * made.unet.config.sample_size == PUBLISHED[sizes].resolution
