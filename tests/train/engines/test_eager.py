"""What one optimiser step does: accumulation, bad numbers, fp16, updates in backward, lean weights, memory layout."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from support.cases.plain import IDS, POISONED, built, same, stage, weights_of  # noqa: F401  (fixtures)
from support.tiny_runs import rows, same_weights, train
from support.zero_runs import write_ds

from sgg_fast.config import ConfigError
from sgg_fast.train.engines.base import Engine

SLOW = pytest.mark.slow


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Every number of the optimiser's state, copied."""
    return [
        torch.as_tensor(value).clone()
        for state in engine.optimizer.state.values()
        for value in state.values()
        if not isinstance(value, str)
    ]


@pytest.mark.parametrize(
    ("name", "changes"),
    [(None, {}), (None, {"precision": "fp16"}), ("zero2", {}), ("zero3", {}),
     pytest.param(None, {"weights": "lean"}, marks=SLOW), pytest.param("zero0", {}, marks=SLOW),
     pytest.param("zero2", {"precision": "bf16", "accumulation_steps": 2, "batch_size": 1}, marks=SLOW),
     pytest.param("zero2-offload", {}, marks=SLOW)],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_as_ever(built, name, changes):
    """From bad data (the loss is NaN), then from one gradient alone (the loss is finite)."""
    engine = built(name, **changes)
    shape = (changes.get("accumulation_steps", 1), -1)
    assert engine.update(IDS.reshape(shape), 0).applied
    before, state = weights_of(engine), state_of(engine)
    assert len(state) > 4

    bad = engine.update(POISONED.reshape(shape), 1)
    assert not bad.applied and bad.losses["loss"].isnan()
    watched = engine.module.unet.conv_in.weight
    hook = watched.register_hook(lambda gradient: gradient * torch.inf)
    overflow = engine.update(IDS.reshape(shape), 1)
    hook.remove()
    assert not overflow.applied and overflow.losses["loss"].isfinite()
    assert same(weights_of(engine), before)
    assert all(a.equal(b) for a, b in zip(state_of(engine), state, strict=True))

    assert engine.update(IDS.reshape(shape), 1).applied
    after = weights_of(engine)
    assert all(value.isfinite().all() for value in after.values()) and not same(after, before)


def test_fp16_computes_the_same_loss_and_weights_stay_fp32(built):
    """Within 2e-3 at the first step; fp16 has three more digits than bf16."""
    exact, half = built(precision="fp32"), built(precision="fp16")
    loss, rounded = (engine.update(IDS, 0).losses["loss"] for engine in (exact, half))
    assert 0 < (rounded - loss).abs() < 2e-3
    assert {p.dtype for p in half.module.parameters()} == {torch.float32}


def test_in_backward_skips_a_bad_loss_before_it_touches_anything(built):
    engine = built(optimizer_in_backward=True, max_grad_norm=0.0)
    assert engine.update(IDS, 0).applied
    before = weights_of(engine)
    assert not engine.update(POISONED, 1).applied
    assert same(weights_of(engine), before)
    watched = engine.module.unet.conv_in.weight
    hook = watched.register_hook(lambda gradient: gradient * torch.inf)
    assert not engine.update(IDS, 1).applied, "said, though the other weights have moved by then"
    hook.remove()
    assert watched.equal(before["unet.conv_in.weight"])


def test_in_backward_is_the_ordinary_step_though_its_weights_are_rounded_by_chance(built):
    ordinary, hooked = (built(weights="lean", max_grad_norm=0.0, optimizer_in_backward=on) for on in (False, True))
    for step in range(2):
        a, b = (engine.update(IDS, step).losses["loss"] for engine in (ordinary, hooked))
        assert a.equal(b)
    assert same(weights_of(ordinary), weights_of(hooked))
    assert all(p.grad is None for p in hooked.module.parameters())


@pytest.mark.parametrize("weights", ["master", "lean"])
def test_in_backward_leaves_nothing_behind(built, weights):
    """Hooks in backward outlive no engine: autograd would keep what they hold, out of reach of Python's collector."""
    engine = built(optimizer_in_backward=True, max_grad_norm=0.0, weights=weights)
    parameter = engine.parameters[0]
    engine.update(IDS, 0)
    watched = [weakref.ref(one) for one in (engine, engine.optimizer, engine.module)]
    del engine
    gc.collect()
    assert [one() for one in watched] == [None, None, None]
    parameter.sum().backward()  # its hook is there and does nothing
    assert parameter.grad is not None


def test_lean_weights_are_bf16_in_the_unet_and_fp32_in_the_graph_modules(built):
    engine = built(weights="lean")
    module = engine.module
    assert {p.dtype for p in module.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.conditioner.parameters()} == {torch.float32}
    before = weights_of(engine)
    engine.update(IDS, 0)
    for own, group in zip(engine.optimizer._groups, engine.optimizer.param_groups, strict=True):
        assert own.moments[0].dtype == (torch.uint8 if group["optim_bits"] == 8 else torch.float32)
    assert not same(weights_of(engine), before)


@pytest.mark.parametrize("flag", [{"weights": "lean"}, {"optimizer_in_backward": True, "max_grad_norm": 0.0}])
def test_deepspeed_keeps_masters_of_its_own(built, flag):
    with pytest.raises(ConfigError, match=r"runs without --deepspeed, which keeps master weights") as caught:
        built("zero2", **flag)
    assert "\n" not in str(caught.value)


def test_accumulated_micro_batches_have_the_gradient_of_one_large_batch(built):
    gradients = []
    for ids_KB in (np.array([[0, 1, 2, 3]]), np.array([[0, 1], [2, 3]])):
        engine = built(max_grad_norm=0.0)
        taken = {}
        engine.optimizer.step = lambda e=engine, t=taken: t.update(
            {name: p.grad.clone() for name, p in e.module.named_parameters() if p.grad is not None}
        )
        engine.update(ids_KB, 0)
        gradients.append(taken)
    whole, parts = gradients
    assert len(whole) > 50 and parts.keys() == whole.keys()
    norm = torch.stack([g.norm() for g in whole.values()]).norm()
    assert torch.stack([(parts[k] - whole[k]).norm() for k in whole]).norm() < 1e-5 * norm


def test_a_run_with_accumulation_is_the_run_with_the_large_batch(tmp_path):
    settings = {"finetune_steps": 2}
    train(tmp_path / "large", "finetune", **settings, batch_size=4)
    train(tmp_path / "parts", "finetune", **settings, batch_size=2, accumulation_steps=2)
    large, parts = (rows(tmp_path / name / "finetune") for name in ("large", "parts"))
    for step in large:
        for name in large[step]:
            assert abs(parts[step][name] - large[step][name]) < 1e-4, (step, name)


def test_channels_last_survives_the_first_step(built):
    engine = built()
    kernels = [p for p in engine.module.unet.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert len(kernels) > 10
    engine.update(IDS, 0)
    for p in kernels:
        _, width, high, wide = p.shape
        assert p.stride() == (width * high * wide, 1, width * wide, width), "channels vary fastest"


def test_checkpointing_recomputes_the_blocks_and_changes_no_number(built):
    results = {}
    for on in (False, True):
        engine, calls = built(gradient_checkpointing=on), []
        for block in (m for m in engine.module.unet.modules() if isinstance(m, ResnetBlock2D)):
            block.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        loss = engine.update(IDS, 0).losses["loss"]
        results[on] = loss, weights_of(engine), len(calls)
    assert results[True][0].equal(results[False][0]) and same(results[True][1], results[False][1])
    assert results[True][2] >= 1.8 * results[False][2], "resnet blocks ran again in backward"


@pytest.mark.parametrize(
    ("name", "changes"),
    [(None, {"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0, "ema": 0.5}),
     pytest.param(None, {"precision": "fp16", "accumulation_steps": 2, "batch_size": 1, "ema": 0.5}, marks=SLOW),
     pytest.param("zero3", {"ema": 0.5}, marks=SLOW)],
)  # fmt: skip
def test_a_resumed_run_is_the_undisturbed_run(tmp_path, name, changes):
    path = name and str(write_ds(tmp_path, name))
    whole = train(tmp_path / "whole", "finetune", path, **changes, finetune_steps=3, checkpoint_every=3)
    train(tmp_path / "parts", "finetune", path, **changes, finetune_steps=2)
    parts = train(tmp_path / "parts", "finetune", path, **changes, finetune_steps=3)
    assert rows(parts.parent) == rows(whole.parent) and len(rows(whole.parent)) == 3
    assert same_weights(parts, whole)


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero0", marks=SLOW), pytest.param("zero3", marks=SLOW)])
def test_a_result_holds_the_fp32_masters(built, stage, name):
    """And not the bf16 weights: these are the masters' roundings."""
    engine = built(name, precision="bf16", optimizer="adam8bit")
    engine.update(IDS, 0)
    whole = weights_of(engine)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert whole["unet.conv_in.weight"].shape == stage.unet.conv_in.weight.shape
    widths = [state["state1"].dtype for state in engine.optimizer.state.values()]
    if name != "zero0":  # one flat tensor a group: UNet and graph modules, matrices and the rest
        assert sorted(map(str, widths)) == ["torch.float32"] * 2 + ["torch.uint8"] * 2
    rounded = sum(value.bfloat16().float().equal(value) for value in whole.values())
    assert rounded < 0.5 * len(whole)
    if name != "zero3":
        for parameter, value in ((engine.module.get_parameter(k), v) for k, v in whole.items()):
            assert parameter.dtype == torch.bfloat16 and parameter.equal(value.bfloat16())
