"""Learning rates, parameter groups and the choice of optimiser."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import DS_JSON
from support.tiny_runs import trainer
from torch import nn

from sgg_fast.config import ConfigError, OptimConfig
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.ds_config import check_engine
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import (
    MIN_8BIT_ELEMENTS,
    STATES,
    build_optimizer,
    is_flat,
    lr_factor,
    parameter_groups,
)

pytest.importorskip("bitsandbytes")
from sgg_fast.train.optim.adam_bnb import GroupedAdam8bit

IDS = np.array([[0, 1]])
SMALL = ("adam4bit", "adafactor")


@pytest.fixture
def built(tmp_path):
    """Makes fine-tuning trainers."""
    return lambda ds_path=None, **changes: trainer(tmp_path, "finetune", ds_path, **changes)


def test_groups_part_matrices_from_what_keeps_32_bit_state(built):
    one = built()
    module, groups = one.engine.module, parameter_groups(one.engine.module, one.config.optim)
    of = {id(p): group for group in groups for p in group["params"]}
    wanted = {id(p) for p in module.parameters() if p.requires_grad}
    assert of.keys() == wanted and sum(len(g["params"]) for g in groups) == len(wanted)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim < 2 or parameter.numel() < MIN_8BIT_ELEMENTS
            lr = one.config.optim.unet_lr if name.startswith("unet.") else one.config.optim.graph_lr
            assert (of[id(parameter)]["optim_bits"], of[id(parameter)]["lr"]) == (32 if small else 8, lr), name
    assert {group["name"] for group in groups} == {"unet/8", "unet/32", "graph/8", "graph/32"}


def test_groups_of_one_kind_follow_each_other_where_one_would_be_too_large(built):
    one = built()
    whole, most = parameter_groups(one.engine.module, one.config.optim), 30_000
    split = parameter_groups(one.engine.module, one.config.optim, most)
    for group in whole:
        parts = [g for g in split if g["name"] == group["name"]]
        assert {id(p) for g in parts for p in g["params"]} == {id(p) for p in group["params"]}
        assert {(g["lr"], g["optim_bits"]) for g in parts} == {(group["lr"], group["optim_bits"])}
        sizes = [[p.numel() for p in g["params"]] for g in parts]
        assert all(sum(numels) <= most or len(numels) == 1 for numels in sizes)
        assert all(sum(a) + b[0] > most for a, b in itertools.pairwise(sizes))  # none smaller than it must be
    assert len(split) > len(whole)


def test_plain_state_is_8_bit_for_matrices_and_32_bit_for_the_rest(built):
    one = built(optimizer="adam8bit")
    one.engine.update(IDS, 0)
    optimizer = one.engine.optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            assert state["state1"].shape == (parameter.numel(),)
            assert state["state1"].dtype == (torch.uint8 if group["optim_bits"] == 8 else torch.float32)


@pytest.mark.parametrize("ds_path", [None, DS_JSON])
def test_the_learning_rate_factor_reaches_the_update(built, ds_path):
    """A first Adam step moves every weight by its rate: not at all at factor 0, by half as much at a half."""
    one = built(ds_path, optimizer="adam", max_grad_norm=0.0)
    watched = one.engine.module.unet.conv_in.weight
    moved = []
    for factor in (0.0, 0.5):
        before = watched.detach().clone()
        one.engine.update(IDS, 0, factor)
        moved.append((watched.detach() - before).abs().max().item())
    assert moved[0] == 0 and moved[1] == pytest.approx(0.5 * one.config.optim.unet_lr, rel=0.1)


def test_learning_rate_schedules():
    rates = [lr_factor(OptimConfig(warmup_steps=4), step, 10) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75, *[1.0] * 7]
    config = recipe("toy", lr_schedule="cosine", warmup_steps=2)
    rates = [lr_factor(config.optim, step, 101) for step in range(101)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.01)
    assert rates[51] == pytest.approx(0.505, abs=0.01) and all(a >= b for a, b in itertools.pairwise(rates[1:]))


def test_engines_choose_it_where_the_kernels_run():
    module = nn.ModuleDict({"unet": nn.Linear(70, 99), "graph": nn.Linear(9, 9)})
    ours = OptimConfig(optimizer="adam8bit", max_grad_norm=0.5)
    in_backward = OptimConfig(optimizer="adam8bit", optimizer_in_backward=True, max_grad_norm=0.0)
    lean, split = (OptimConfig(optimizer="adam8bit", weights=weights) for weights in ("lean", "split"))
    assert [is_flat(optim, False) for optim in (ours, OptimConfig(), lean, split, in_backward)] == [False] * 2 + [
        True
    ] * 3
    assert is_flat(ours, True) and is_flat(OptimConfig(), True)
    assert type(build_optimizer(module, ours, 0, "finetune")) is GroupedAdam8bit
    assert type(build_optimizer(module, OptimConfig(), 0, "finetune")) is torch.optim.Adam, "the toy's, on a CPU"
    made = build_optimizer(module, ours, 0, "finetune", flat=True)
    assert type(made) is FlatAdam and made.hyper.max_norm == 0.5
    assert {g["name"]: g["optim_bits"] for g in made.param_groups} == {"unet/8": 8, "unet/32": 32, "graph/32": 32}
    exact = build_optimizer(module, OptimConfig(optimizer="adam"), 0, "finetune", flat=True)
    assert {g["optim_bits"] for g in exact.param_groups} == {32}


def test_chosen_by_name_and_only_without_deepspeed():
    module = nn.ModuleDict({"unet": nn.Linear(70, 99), "graph": nn.Linear(9, 9)})
    for name in SMALL:
        optim = OptimConfig(optimizer=name)
        assert is_flat(optim, False)
        made = build_optimizer(module, optim, 0, "finetune", flat=True)
        found = {g["name"]: (g["optim_bits"], g.get("factored", False)) for g in made.param_groups}
        small = (32, True) if name == "adafactor" else (4, False)
        assert found == {"unet/8": small, "unet/32": (32, False), "graph/32": (32, False)}
        with pytest.raises(ConfigError, match=f"--optimizer {name} runs without --deepspeed"):
            check_engine(optim, "finetune", "ds.json")
        OptimConfig(optimizer=name, weights="lean", optimizer_in_backward=True, max_grad_norm=0.0)
    assert set(STATES) == {"adam", "adam8bit", *SMALL}
