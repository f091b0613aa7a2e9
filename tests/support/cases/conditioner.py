"""Inputs and fixtures that tests share with `test_conditioner.py`."""

from __future__ import annotations

import torch

from sgg_fast.config import ModelConfig
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.train.assemble import conditioner_of
from support.loops import jitter
from support.sd_folder import CLIP_WIDTH

TWO_GRAPHS = [SceneGraph(("sheep", "grass"), ((0, "standing on", 1),)), SceneGraph(("red hat",))]

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


def of_foundation(foundation: Foundation, kind: str = "sgg", **settings: object) -> Conditioner:
    """A small conditioner for the UNet and the CLIP of a `support.sd_folder` foundation."""
    torch.manual_seed(0)
    config = ModelConfig(conditioner=kind, width=8, num_layers=1, **settings)
    return conditioner_of(config, CLIP_WIDTH, CLIP_WIDTH, foundation.backbone, ("sheep", "grass", "standing on"))
