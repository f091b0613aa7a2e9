"""Plain engines of the toy's fine-tuning, or DeepSpeed's, on fresh copies of one stage; one image of it is bad."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sgg_fast.nn.attention import checkpoint_activations
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.base import Engine
from sgg_fast.train.engines.choose import build_engine, plan_engine
from sgg_fast.train.stages import FinetuneStage
from support.tiny_runs import TINY, trainer
from support.zero_runs import write_ds

CPU = torch.device("cpu")
IDS = np.array([[0, 1]])
POISONED = np.array([[0, 7]])


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> FinetuneStage:
    """The toy's fine-tuning stage, in which image 7 has a latent that is not a number. Copied by every test."""
    one = trainer(tmp_path_factory.mktemp("stage"), "finetune")
    one.cache.moments[7, 0, 0, 0] = torch.nan
    return one.engine.module


@pytest.fixture
def built(stage, tmp_path):
    """Makes engines on fresh copies of the stage: plain, or DeepSpeed's by a name in `ZERO`."""

    def build(name: str | None = None, **changes) -> Engine:
        module, config = copy.deepcopy(stage), recipe("toy", **{**TINY, **changes})
        module.config = config
        if config.model.gradient_checkpointing:
            checkpoint_activations(module.unet)
        ds = plan_engine(config.optim, "finetune", CPU, name and str(write_ds(tmp_path, name)))
        return build_engine(module, CPU, ds)

    return build


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.exported():
        return {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
