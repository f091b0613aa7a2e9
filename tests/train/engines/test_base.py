"""What engines share: what "auto" becomes by settings and device, which never refuses; means over micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.tiny_runs import TINY, trainer

from sgg_fast.config import ConfigError, read_settings
from sgg_fast.recipes import RECIPES, recipe
from sgg_fast.train.engines.base import resolve_matmul, resolve_weights, resolved
from sgg_fast.train.memory.planner import Planner

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NOT_SPLIT = [{"lora": 4}, {"ema": 0.99}, {"precision": "fp32"}, {"precision": "fp16"}]


@pytest.mark.parametrize("name", ["toy", "vg256", "vg256-best"])
def test_every_recipe_runs_in_halves_on_cuda_and_as_before_elsewhere(name):
    optim = recipe(name).optim
    assert resolve_weights(optim, CUDA, True, False) == "split"
    assert resolve_weights(optim, CUDA, False, False) == "master", "--kernels reference: torch's or bitsandbytes' Adam"
    assert resolve_weights(optim, CUDA, True, True) == "master", "DeepSpeed"
    assert resolve_weights(optim, CPU, False, False) == "master"


@pytest.mark.parametrize("changes", NOT_SPLIT, ids=str)
def test_what_halves_cannot_hold_keeps_fp32(changes):
    assert resolve_weights(recipe("toy", **changes).optim, CUDA, True, False) == "master"


@pytest.mark.parametrize("weights", ["master", "split", "lean"])
def test_a_word_is_kept(weights):
    config = recipe("toy", weights=weights)
    assert resolved(config, "finetune", CUDA, True, False) == config


def test_auto_is_never_refused():
    """Every pair of settings that runs with fp32 weights runs with auto, whatever that becomes."""
    values = [
        *NOT_SPLIT,
        {"precision": "bf16"},
        {"optimizer": "adam"},
        {"optimizer": "adam8bit"},
        {"accumulation_steps": 2},
        {"optimizer_in_backward": True, "max_grad_norm": 0.0},
        {"attention": "cudnn"},
    ]
    num = 0
    for name, one, other in itertools.product(RECIPES, values, values):
        try:
            recipe(name, weights="master", **{**one, **other})
        except ConfigError:
            continue
        for device, kernels, ds in itertools.product((CUDA, CPU), (True, False), (True, False)):
            resolved(recipe(name, weights="auto", **{**one, **other}), "finetune", device, kernels, ds)
            num += 1
    assert num > 2000


def test_the_plan_says_what_auto_became():
    runs = (("cuda", None), ("cpu", None), ("cuda", {"zero_optimization": {"stage": 2}}))
    titles = [Planner(recipe("toy", **TINY), ds, device).plan(2).title for device, ds in runs]
    assert ["two halves" in title for title in titles] == [True, False, False]


@pytest.mark.parametrize(
    ("device", "changes", "behind"),
    [("cuda", {}, False), ("cuda", {"max_grad_norm": 0.0}, True), ("cpu", {"max_grad_norm": 0.0}, False),
     ("cuda", {"max_grad_norm": 0.0, "cuda_graphs": False}, False)],
)  # fmt: skip
def test_the_plan_says_that_updates_run_behind_backward(device, changes, behind):
    """They keep all gradients, so the sizes are those of an update after it."""
    plan, clipped = (Planner(recipe("toy", **{**TINY, **given}), None, device).plan(2) for given in (changes, {}))
    assert ("optimiser behind backward, all gradients kept" in plan.title) == behind
    if changes.keys() == {"max_grad_norm"}:
        assert plan.moments == clipped.moments


def test_a_run_saves_what_auto_became_and_a_resumed_one_keeps_it(tmp_path):
    trainer(tmp_path, "finetune", weights="split", finetune_steps=1).train()
    went_on = trainer(tmp_path, "finetune", finetune_steps=2)
    assert went_on.first_step == 1 and went_on.config.optim.weights == "split", "typed auto, on a CPU"
    assert went_on.engine.module.config.optim.weights == "split"
    went_on.train()
    with pytest.raises(ConfigError, match="holds a run with weights 'split', not 'master'"):
        trainer(tmp_path, "finetune", weights="master", finetune_steps=3)

    fresh = trainer(tmp_path / "other", "finetune", finetune_steps=1)
    assert fresh.config.optim.weights == "master"
    fresh.train()
    assert read_settings(tmp_path / "other" / "finetune" / "settings.toml")["weights"] == "master"


def test_tf32_is_for_pre_training_on_cuda():
    optim = recipe("toy").optim
    assert resolve_matmul(optim, "pretrain", CUDA) == "high"
    assert resolve_matmul(recipe("toy", pretrain_matmul="highest").optim, "pretrain", CUDA) == "highest"
    assert resolve_matmul(optim, "finetune", CUDA) == resolve_matmul(optim, "pretrain", CPU) == ""
