"""The flat Adam is torch's with 32-bit state, its checkpoints are bitsandbytes', and engines train by it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.tiny_runs import TINY, trainer
from torch import nn

from sgg_fast import ops
from sgg_fast.nn.merge import adjacent, adjoin
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.engines.state import LossScale
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.flat import keep_low_halves
from sgg_fast.train.stages import FinetuneStage

pytest.importorskip("bitsandbytes")
from sgg_fast.train.optim.adam_bnb import GroupedAdam8bit


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A convolution in channels_last, odd sizes, a matrix below bitsandbytes' 4 096 elements, an unused weight."""
    torch.manual_seed(seed)
    made = nn.ModuleDict({"conv": nn.Conv2d(8, 70, 3), "norm": nn.GroupNorm(1, 70), "linear": nn.Linear(70, 99),
                          "small": nn.Linear(99, 3), "idle": nn.Linear(3, 3)})  # fmt: skip
    return made.to(dtype, memory_format=torch.channels_last)


def groups(module: nn.Module, lr: float = 1e-3) -> list[dict[str, object]]:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "lr": lr, "optim_bits": 8, "name": "unet/8"},
        {"params": rest, "lr": lr / 2, "optim_bits": 32, "name": "unet/32"},
    ]


def loss(net: nn.Module, step: int) -> torch.Tensor:
    dtype = net["conv"].weight.dtype
    x = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
    h = net["norm"](net["conv"](x)).relu().mean((2, 3))
    return (net["small"](net["linear"](h).relu()).float() - step % 3).square().mean()


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for step in numbers:
        loss(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(state: dict, path) -> dict:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def distance(a: nn.Module, b: nn.Module) -> float:
    return sum((p.double() - q.double()).square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def whole(net: nn.Module, max_norm: float = 0.0) -> FlatAdam:
    """One group with 32-bit state, which is pre-training's."""
    return FlatAdam([{"params": list(net.parameters()), "lr": 1e-2, "optim_bits": 32}], 0, max_norm)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_with_32_bits_is_torchs_adam_over_many_steps(max_norm):
    """100 steps, the rate changing; the difference stays at rounding. (Near the minimum signs of gradients decide, and
    later steps make more of it: by a version of torch.)"""
    net, other = network(), network()
    ours, theirs = whole(net, max_norm), torch.optim.Adam(other.parameters(), 1e-2)
    clipped = 0
    for step in range(100):
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (1 + step % 4)
        for one, optimizer in ((net, ours), (other, theirs)):
            loss(one, step).backward()
            if optimizer is theirs and max_norm:
                clipped += bool(nn.utils.clip_grad_norm_(other.parameters(), max_norm) > max_norm)
            optimizer.step()
            optimizer.zero_grad()
    assert ours.num_steps.item() == 100 and ours.applied == 1
    assert clipped > 50 or not max_norm
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    start = dict(network().named_parameters())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start) - {"idle.weight", "idle.bias"}, "without a gradient nothing moves, the rest does"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    net = network()
    optimizer = whole(net, 1.0)
    loss(net, 0).backward()
    optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer._groups[0].moments, optimizer.num_steps))
    corrections = optimizer.control[2:4].clone()
    net.zero_grad()
    loss(net, 1).backward()
    net["norm"].bias.grad[3] = bad
    optimizer.step()
    assert optimizer.applied == 0
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    assert all(map(torch.equal, optimizer._groups[0].moments, before[1])) and torch.equal(
        optimizer.num_steps, before[2]
    )
    assert torch.equal(optimizer.control[2:4], corrections)


def test_stays_as_near_to_adam_as_bitsandbytes_does():
    """60 steps. Its quantiser on CPUs is coarser than ours, so ours may be nearer, not twice as far."""
    exact, ours, theirs = network(), network(), network()
    steps(exact, torch.optim.Adam(groups(exact)), range(60))
    steps(ours, FlatAdam(groups(ours), seed=0), range(60))
    steps(theirs, GroupedAdam8bit(groups(theirs)), range(60))
    assert 0 < distance(ours, exact) < 4 * distance(theirs, exact) < 0.05 * distance(ours, network()), "squares"


def test_a_gradient_of_zero_after_a_small_one_moves_nothing_far():
    """Its second moment is below the map's least value, its first far above: at most a step, not m / eps."""
    weight = nn.Parameter(torch.zeros(20, 256))
    optimizer = FlatAdam([{"params": [weight], "lr": 1e-3, "optim_bits": 8}], seed=0)
    for step in range(4):
        weight.grad = torch.zeros(20, 256)
        weight.grad[:, 0] = 1.0
        if step == 0:
            weight.grad[:, 1:] = torch.logspace(-6, -2, 20)[:, None]
        optimizer.step()
    assert weight.abs().max() < 4.1e-3


def test_takes_over_from_bitsandbytes(tmp_path):
    """The step after loading moves weights by moments that are not quantised anew: its own step."""
    theirs = network()
    optimizer = GroupedAdam8bit(groups(theirs))
    steps(theirs, optimizer, range(3))
    ours = copy.deepcopy(theirs)
    ours.zero_grad()
    flat = FlatAdam(groups(ours), seed=0)
    flat.load_state_dict(saved(optimizer.state_dict(), tmp_path / "state.pt"))
    assert flat.num_steps == 3
    steps(theirs, optimizer, range(3, 4))
    steps(ours, flat, range(3, 4))
    _assert_same_step(ours, theirs)


def test_bitsandbytes_takes_over(tmp_path):
    ours = network()
    flat = FlatAdam(groups(ours), seed=0)
    steps(ours, flat, range(3))
    theirs = network()
    theirs.load_state_dict(ours.state_dict())
    optimizer = GroupedAdam8bit(groups(theirs))
    optimizer.load_state_dict(saved(flat.state_dict(), tmp_path / "state.pt"))
    steps(theirs, optimizer, range(3, 4))
    steps(ours, flat, range(3, 4))
    _assert_same_step(theirs, ours)
    assert all(state["step"] == 4 for p, state in optimizer.state.items() if p.grad is not None)


def _assert_same_step(a: nn.Module, b: nn.Module) -> None:
    """The small matrix's moments may have been quantised on the way, 1 % of an update of 1e-3."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        close = {"rtol": 0, "atol": 3e-4} if name == "small.weight" else {"rtol": 1e-5, "atol": 2e-7}
        torch.testing.assert_close(p, q, **close, msg=lambda m, name=name: f"{name}: {m}")


def test_torchs_adam_takes_over_and_gives_back(tmp_path):
    """With 32-bit state in every group, which `--optimizer adam` has."""
    ours, theirs = network(), network()
    flat = FlatAdam([{**g, "optim_bits": 32} for g in groups(ours)], seed=0)
    steps(ours, flat, range(3))
    theirs.load_state_dict(ours.state_dict())
    adam = torch.optim.Adam(groups(theirs))
    adam.load_state_dict(saved(flat.state_dict(), tmp_path / "state.pt"))
    again = network()
    steps(theirs, adam, range(3, 6))
    again.load_state_dict(theirs.state_dict())
    back = FlatAdam([{**g, "optim_bits": 32} for g in groups(again)], seed=0)
    back.load_state_dict(saved(adam.state_dict(), tmp_path / "state.pt"))
    steps(again, back, range(6, 8))
    steps(ours, flat, range(3, 8))
    for p, q in zip(again.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["fp32", "split", "rounded"])
def test_resumes_bit_for_bit(form, tmp_path):
    """Corrections and draws included, over a skipped step."""
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    net, other = network(dtype), network(dtype, seed=1)
    first, second = (FlatAdam(groups(n), 7, 1.0, split=form == "split") for n in (net, other))
    steps(net, first, range(4))
    loss(net, 4).backward()
    net["small"].bias.grad.fill_(torch.nan)
    first.step()
    first.zero_grad()
    assert first.applied == 0 and first.num_steps == 4
    other.load_state_dict(net.state_dict())
    second.load_state_dict(saved(first.state_dict(), tmp_path / "state.pt"))
    steps(net, first, range(5, 8))
    steps(other, second, range(5, 8))
    assert same(net, other)


def test_split_weights_are_fp32_weights():
    """bf16 weights with their low halves follow fp32 weights that get the same gradients, bit for bit."""
    start = torch.randn(3, 700).bfloat16()
    whole, split = nn.Parameter(start.float()), nn.Parameter(start.clone())
    one = FlatAdam([{"params": [whole], "lr": 1e-5, "optim_bits": 8}], seed=0)
    other = FlatAdam([{"params": [split], "lr": 1e-5, "optim_bits": 8}], seed=0, split=True)
    for step in range(6):
        split.grad = torch.randn(3, 700, generator=torch.Generator().manual_seed(step)).bfloat16()
        whole.grad = split.grad.float()
        one.step()
        other.step()
        assert torch.equal(split, whole.bfloat16())
    assert not torch.equal(whole, start.float()) and (split != start).float().mean() < 0.1


def test_weights_keep_layout_and_merged_ones_stay_end_to_end():
    """q, k, v and their biases, whose numbers of elements no block divides, between others in the order of names."""
    net = network()
    first, second = ([nn.Linear(16, 16) for _ in range(3)] for _ in range(2))
    weights = [layer.weight for layer in (first[0], second[0], first[1], second[1], first[2], second[2])]
    biases = [layer.bias for layer in (first[0], second[0], first[1], second[1], first[2], second[2])]
    for layers in (first, second):
        adjoin([layer.weight for layer in layers])
        adjoin([layer.bias for layer in layers])
    before = [p.detach().clone() for p in (*net.parameters(), *weights, *biases)]
    strides = [p.stride() for p in net.parameters()]
    given = groups(net)
    given[0]["params"] += weights
    given[1]["params"] += biases
    FlatAdam(given, seed=0)
    assert all(map(torch.equal, before, (*net.parameters(), *weights, *biases)))
    assert [p.stride() for p in net.parameters()] == strides
    for layers in (first, second):
        assert adjacent([layer.weight for layer in layers]) and adjacent([layer.bias for layer in layers])


def in_backward(net: nn.Module, form: str = "fp32") -> FlatAdam:
    return FlatAdam(groups(net), 7, split=form == "split", in_backward=True)


def passes(net: nn.Module, optimizer: FlatAdam, numbers: range) -> None:
    """Steps inside backward."""
    for step in numbers:
        optimizer.send_rates()
        optimizer.begin()
        loss(net, step).backward()
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("form", ["fp32", "split", "rounded"])
def test_in_backward_is_the_ordinary_step(form, backend, tmp_path):
    """Bit for bit, over a resumed state: a draw depends on its seed, its step and its place alone."""
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    plain, hooked, resumed = (network(dtype) for _ in range(3))
    with ops.assumed(backend):
        ordinary = FlatAdam(groups(plain), 7, split=form == "split")
        steps(plain, ordinary, range(2))
        own = in_backward(hooked, form)
        passes(hooked, own, range(2))
        assert same(plain, hooked) and not same(plain, network(dtype))
        resumed.load_state_dict(hooked.state_dict())
        again = in_backward(resumed, form)
        again.load_state_dict(saved(own.state_dict(), tmp_path / "state.pt"))
        assert again.num_steps.tolist() == own.num_steps.tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 0]
        steps(plain, ordinary, range(2, 3))
        for net, optimizer in ((hooked, own), (resumed, again)):
            passes(net, optimizer, range(2, 3))
            assert same(plain, net)
            torch.testing.assert_close(optimizer.norm, ordinary.norm, rtol=1e-5, atol=0)
            assert optimizer.applied == 1


def test_each_goes_on_from_the_others_state(tmp_path):
    """A run that leaves --optimizer-in-backward, or takes it up, keeps its moments and its number of steps."""
    plain, hooked = network(), network()
    ordinary, own = FlatAdam(groups(plain), 7), in_backward(hooked)
    steps(plain, ordinary, range(3))
    passes(hooked, own, range(3))
    to_plain, to_hooked = network(), network()
    to_plain.load_state_dict(hooked.state_dict())
    to_hooked.load_state_dict(plain.state_dict())
    one, other = FlatAdam(groups(to_plain), 7), in_backward(to_hooked)
    one.load_state_dict(saved(own.state_dict(), tmp_path / "own.pt"))
    other.load_state_dict(saved(ordinary.state_dict(), tmp_path / "ordinary.pt"))
    assert one.num_steps == 3 and other.num_steps.max() == 3
    steps(to_plain, one, range(3, 4))
    passes(to_hooked, other, range(3, 4))
    for p, q in zip(to_plain.parameters(), to_hooked.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_in_backward_a_bad_gradient_stops_its_own_weight_alone(bad):
    net = network()
    optimizer = in_backward(net)
    passes(net, optimizer, range(1))
    before = copy.deepcopy(net)
    hook = net["linear"].weight.register_hook(lambda grad: grad.index_put((torch.tensor(60),), torch.tensor(bad)))
    passes(net, optimizer, range(1, 2))
    hook.remove()
    assert optimizer.applied == 0 and not optimizer.norm.isfinite()
    assert net["linear"].weight.equal(before["linear"].weight)
    assert not net["conv"].weight.equal(before["conv"].weight)
    passes(net, optimizer, range(2, 3))
    assert optimizer.applied == 1 and optimizer.norm.isfinite()
    assert not net["linear"].weight.equal(before["linear"].weight)
    assert sorted(optimizer.num_steps.tolist()) == [0, 0, 2, 3, 3, 3, 3, 3, 3, 3]


def test_united_weights_are_decided_together():
    """As segments behind backward are: a bad gradient of one skips both, and they go on from their own count."""
    weights = [nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(2, 2))]
    optimizer = FlatAdam([{"params": weights, "lr": 1e-2, "optim_bits": 32}], 0)
    assert all(a is b for a, b in zip(optimizer.parameters(), weights, strict=True))
    optimizer.apart()
    optimizer.unite([0, 1])
    for bad in (True, False):
        before = [p.detach().clone() for p in weights]
        for p in weights:
            p.grad = torch.ones_like(p)
        if bad:
            weights[1].grad[3] = torch.nan
        optimizer.send_rates()
        optimizer.begin()
        for numbers in ([0, 1], [2]):
            gradients = optimizer.gradients(numbers)
            optimizer.update(gradients, optimizer.table(gradients), numbers[0])
        optimizer.sum_up()
        assert bool(optimizer.applied) != bad and bool(optimizer.norm.isfinite()) != bad
        assert [not p.equal(was) for p, was in zip(weights, before, strict=True)] == [not bad, not bad, True]
    assert {number: state["step"] for number, state in optimizer.state_dict()["state"].items()} == {0: 1, 1: 1, 2: 2}


def test_split_weights_are_given_out_in_fp32():
    exact, whole = torch.randn(3, 700), nn.Parameter(torch.zeros(4))
    split = nn.Parameter(exact.clone())
    keep_low_halves([split])
    groups = [{"params": [p], "lr": 1e-5, "optim_bits": 32} for p in (whole, split)]
    ((parameter, value),) = FlatAdam(groups, seed=0, split=True).split_weights()
    assert parameter is split and split.dtype == torch.bfloat16 and value.equal(exact)


def test_refused(tmp_path):
    net = network()
    flat = FlatAdam(groups(net), seed=0)
    steps(net, flat, range(1))
    state = flat.state_dict()
    with pytest.raises(ValueError, match="other parameter groups"):
        FlatAdam(groups(net)[:1], seed=0).load_state_dict(state)
    for name, wrong, reason in (
        ("qmap1", torch.linspace(-1, 1, 256), "qmap1 is not the map of 8-bit state: go on with the --optimizer"),
        ("absmax2", torch.zeros(3), r"absmax2 is torch.float32 \[3\]"),
    ):
        broken = copy.deepcopy(state)
        broken["state"][0]["__bnb_optimizer_quant_state__"][name] = wrong
        with pytest.raises(ValueError, match=reason):
            flat.load_state_dict(broken)
    mixed = [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4).bfloat16())]
    with pytest.raises(ValueError, match="all in fp32 or all in bf16"):
        FlatAdam([{"params": mixed, "lr": 1.0, "optim_bits": 8}], seed=0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> FinetuneStage:
    """The toy's fine-tuning stage; copied by every test."""
    return trainer(tmp_path_factory.mktemp("stage"), "finetune").engine.module


def engine_of(stage: FinetuneStage, flat: bool = False, **changes: object) -> EagerEngine:
    """A plain engine on a fresh copy; flat: with the optimiser that it has on a GPU, here in its reference form."""
    module, config = copy.deepcopy(stage), recipe("toy", **{**TINY, **changes})
    module.config = config
    return EagerEngine(module, torch.device("cpu"), flat=flat or None)


IDS = np.array([[0, 1]])


def test_split_weights_train_without_casts_and_resume(stage, tmp_path):
    """The UNet in bf16, its low halves moving where bf16 cannot; a resumed run continues bit for bit."""
    one, other = (engine_of(stage, weights="split", optimizer="adam8bit", unet_lr=1e-6) for _ in range(2))
    assert type(one.optimizer) is FlatAdam
    assert {p.dtype for p in one.module.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in one.module.conditioner.parameters()} == {torch.float32}
    before = [p.clone() for p in one.module.unet.parameters()]
    first = one.update(IDS, 0)
    lows = [group.weights.low for group in one.optimizer._groups if group.weights.low is not None]
    assert first.applied and len(lows) == 2 and all(low.count_nonzero() > 0.5 * low.numel() for low in lows)
    moved = [(p != q).float().mean().item() for p, q in zip(one.module.unet.parameters(), before, strict=True)]
    assert sum(moved) / len(moved) < 0.1, "at 1e-6 few bf16 numbers change"
    one.save(tmp_path)
    other.load(tmp_path)
    for engine in (one, other):
        engine.update(IDS, 1)
    assert same(one.module, other.module)


def test_loss_scale_overflow_is_skipped_as_the_plain_optimiser_skips_it(stage):
    """The scale that fp16 has, in fp32, where nothing is rounded away: an overflow halves it, and it is taken out."""
    ours, theirs = (engine_of(stage, flat, max_grad_norm=0.1) for flat in (True, False))
    assert type(ours.optimizer) is FlatAdam and type(theirs.optimizer) is torch.optim.Adam
    ours.scale, theirs.scale = LossScale(), LossScale()
    ours.scale.value = 2.0**127
    assert not ours.update(IDS, 0).applied and ours.scale.value == 2.0**126
    ours.scale.value = theirs.scale.value = 2.0**20
    assert ours.update(IDS, 1).applied and theirs.update(IDS, 1).applied
    for p, q in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
