"""Engines: the width of the optimiser's state, DeepSpeed in bf16, what is left behind in the process."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import DS_JSON, ROOT
from support.tiny_runs import flags, trainer

from sgg_fast.config import ConfigError, OptimConfig
from sgg_fast.recipes import recipe
from sgg_fast.train.engines import deepspeed as engines
from sgg_fast.train.optim.groups import MIN_8BIT_ELEMENTS, lr_factor, parameter_groups


@pytest.fixture
def built(tmp_path):
    """Makes fine-tuning trainers."""
    return lambda ds_path=None, **changes: trainer(tmp_path, "finetune", ds_path, **changes)


IDS = np.array([[0, 1]])


def step(one, number=0):
    return one.engine.update(IDS, number)


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
    step(one)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_state_keeps_those_widths_though_a_group_is_one_tensor(built, precision):
    one = built(DS_JSON, precision=precision, optimizer="adam8bit")
    update = step(one)
    assert update.applied and all(torch.isfinite(value) for value in update.losses.values())
    zero = one.engine.engine.optimizer
    assert zero.partition_gradients, "ZeRO-2 is what runs"
    assert one.engine.module.unet.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for group, flat in zip(zero.optimizer.param_groups, zero.single_partition_of_fp32_groups, strict=True):
        state = zero.optimizer.state[flat]
        assert flat.dtype == torch.float32 and flat.ndim == 1
        assert state["state1"].dtype == (torch.uint8 if group["optim_bits"] == 8 else torch.float32), group["name"]


def test_bf16_leaves_the_measured_statistics_in_fp32(built):
    """DeepSpeed 0.19.7 casts parameters only; a version that casts buffers too would blur the vocabulary's mean."""
    one = built(DS_JSON, precision="bf16")
    before = {name: buffer.clone() for name, buffer in one.conditioner.named_buffers()}
    assert {"name_mean", "null_states"} <= before.keys()
    assert {buffer.dtype for buffer in before.values()} == {torch.float32}
    assert not before["name_mean"].equal(before["name_mean"].bfloat16().float()), "not rounded on the way either"
    step(one)
    assert all(buffer.equal(before[name]) for name, buffer in one.conditioner.named_buffers())


ALONE = """
import atexit, socket, sys, torch
atexit.register(lambda: sys.stderr.write(f"left open: {torch.distributed.is_initialized()}"))  # runs last
with socket.socket() as taken:  # the port that DeepSpeed takes by default
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(("127.0.0.1", 29500))
    except OSError:
        pass  # somebody else has it: as good
    import train
    sys.exit(train.main(sys.argv[1:]))
"""


def test_deepspeed_alone_needs_no_port_prints_results_only_and_leaves_nothing_open(tmp_path):
    alone = {k: v for k, v in os.environ.items() if k not in engines.LAUNCHER}
    argv = ["--stage", "finetune", "--deepspeed", DS_JSON, "--out", str(tmp_path), *flags(finetune_steps=1)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        alone["MASTER_PORT"] = str(taken.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", ALONE, *argv], env=alone, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = f"saved {tmp_path}/finetune/pipeline\nnext: python infer.py graph.json --model {tmp_path}\n"
    assert done.stdout == said
    assert done.stderr.endswith("left open: False")
    assert "WARN" not in done.stderr and "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_what_deepspeed_itself_refuses_is_one_config_error(built, tmp_path, monkeypatch):
    """What our own table does not hold back."""
    monkeypatch.setattr("sgg_fast.train.engines.ds_config.check_keys", lambda ds: None)
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}')
    with pytest.raises(ConfigError, match=r"--deepspeed: DeepSpeed refuses these settings: .*reduce_bucket_size"):
        built(str(path))


def test_output_held_back_shows_if_the_block_fails(capsys):
    with engines._held_output():
        print("built")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(RuntimeError), engines._held_output():
        print("compiler says no")
        raise RuntimeError
    assert capsys.readouterr() == ("", "compiler says no\n")


def test_engines_that_cannot_be_are_refused_before_anything_loads(tmp_path):
    with pytest.raises(ConfigError, match="--stage pretrain runs without --deepspeed, on one GPU or several"):
        trainer(tmp_path / "run", "pretrain", DS_JSON)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"--optimizer adam8bit: .*use adam"):
        trainer(tmp_path, "finetune", optimizer="adam8bit")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="deepspeed is not installed"):
        trainer(tmp_path, "finetune", DS_JSON)
