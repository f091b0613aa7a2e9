"""Captured engines of the toy's fine-tuning on the CPU: made alike, trained, compared to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgg_fast.nn.attention import checkpoint_activations
from sgg_fast.nn.fuse import fuse
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.engines import captured as capturing
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.stages import FinetuneStage

from .stage import GRAPHS, conditioner, settings

CPU = torch.device("cpu")


@pytest.fixture
def built(cache, monkeypatch):
    """Makes engines on the CPU with models of their own, always the same; "after" updates after backward."""
    monkeypatch.setattr(capturing, "WARM_UP_STEPS", 1)

    def build(how: str, **changes: object) -> CapturedEngine:
        torch.manual_seed(0)
        made = {"batch_size": 2, "unet_lr": 1e-3, "graph_lr": 3e-3, "max_grad_norm": 0.0, **changes}
        config = settings(**made, optimizer_in_backward=how == "in backward")
        models = toy_foundation(weights=None)
        if config.model.fuse_unet == "on":
            fuse(models.unet)
        if config.model.gradient_checkpointing:
            checkpoint_activations(models.unet)
        stage = FinetuneStage(config, conditioner(config, cache), models, cache)
        with monkeypatch.context() as patch:
            if how == "after":
                patch.setattr(capturing, "goes_behind", lambda *_: False)
            engine = CapturedEngine(stage, CPU)
        assert (engine.behind is not None) == (how == "behind")
        return engine

    return build


def train(engine: CapturedEngine, steps: range) -> list[float]:
    """Losses of steps on samples that their numbers decide."""
    losses = []
    for step in steps:
        drawn = np.random.default_rng(step).permutation(len(GRAPHS))[: 2 * engine.num_micro]
        result = engine.update(drawn.reshape(-1, 2), step)
        assert result.applied
        losses.append(result.losses["loss"].item())
    return losses


def assert_same(found: CapturedEngine, expected: CapturedEngine) -> None:
    """Weights and every number of the optimiser's state, to the bit."""
    for (name, p), q in zip(found.module.named_parameters(), expected.module.parameters(), strict=True):
        assert p.equal(q), name
    one, other = (engine.optimizer.state_dict() for engine in (found, expected))
    assert one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        theirs = other["state"][number]
        assert state["step"] == theirs["step"]
        held = "__bnb_optimizer_quant_state__"
        assert all(tensor.equal(theirs[held][name]) for name, tensor in state[held].items()), number
