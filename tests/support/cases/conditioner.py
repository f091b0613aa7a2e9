"""Inputs and fixtures that tests share with `test_conditioner.py`."""

from __future__ import annotations

import torch

from sgg_fast.nn.conditioner import SceneGraphConditioner
from support.loops import jitter

WIDTH, NAME, IMAGE, CONTEXT = 8, 5, 6, 12


def conditioner(
    encoder: str = "residual", triple: str = "roles", context: str = "triples", null_tokens: int = 77
) -> SceneGraphConditioner:
    torch.manual_seed(0)
    model = SceneGraphConditioner(
        name_dim=NAME, image_dim=IMAGE, context_dim=CONTEXT, width=WIDTH, num_layers=2,
        encoder=encoder, triple=triple, context=context, null_tokens=null_tokens,
    )  # fmt: skip
    states = torch.randn(77, CONTEXT)
    model.calibrate_null(states)
    model.calibrate_tokens(3 * torch.randn(20, CONTEXT) + 1)
    return jitter(model).eval()
