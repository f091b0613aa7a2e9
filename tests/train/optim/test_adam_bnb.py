"""8-bit Adam on weights of every kind: stochastic rounding, memory layout, one weight at a time in backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
from sgg_fast.train.optim import adam_bnb
from sgg_fast.train.optim.adam_bnb import BLOCK, GroupedAdam8bit, stochastic_round

LR = 1e-6


def groups(module: nn.Module, lr: float = LR) -> list[dict[str, object]]:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices, "lr": lr, "optim_bits": 8}, {"params": rest, "lr": lr, "optim_bits": 32}]


def network(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 24, 3), nn.Flatten(), nn.Linear(96, 40)
    )
    module = module.to(dtype)
    return module.to(memory_format=torch.channels_last) if channels_last else module


def loss(module: nn.Module, number: int) -> torch.Tensor:
    dtype = next(module.parameters()).dtype
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(number)).to(dtype)
    return module(x).float().square().mean()


def run(module: nn.Module, num_steps: int, in_backward: bool = False, lr: float = LR) -> GroupedAdam8bit:
    optimizer = GroupedAdam8bit(groups(module, lr), seed=7)
    if in_backward:

        def update(parameter: nn.Parameter) -> None:
            optimizer.step_one(parameter)
            parameter.grad = None

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(update)
    for number in range(num_steps):
        loss(module, number).backward()
        if not in_backward:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_rounding_is_exact_in_expectation_and_never_goes_further_than_a_neighbour():
    """4 000 roundings of one value: their mean is within 4 standard errors of it, each is a bf16 neighbour."""
    generator = torch.Generator().manual_seed(0)
    for value in (1.0, 1.003, -0.1234567, 3e-5, 1e-39, 255.9):
        wide = torch.full((4000,), value)
        rounded = stochastic_round(wide, generator)
        assert rounded.dtype == torch.bfloat16
        down = wide.view(torch.int32).bitwise_and(-65536).view(torch.float32)  # towards zero
        up = (down.view(torch.int32) + 65536).view(torch.float32)
        got = rounded.float()
        assert ((got == down) | (got == up)).all()
        ulp, share = (up - down)[0].double(), ((wide - down) / (up - down))[0].double()
        error = ulp.abs() * (share * (1 - share) / len(wide)).sqrt()
        assert (got.double().mean() - wide[0].double()).abs() <= 4 * error + 1e-45, value


def test_rounding_keeps_what_bf16_holds_and_what_is_not_finite():
    exact = torch.randn(1000).bfloat16()
    assert stochastic_round(exact.float(), torch.Generator()).equal(exact)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    assert str(stochastic_round(odd, torch.Generator()).tolist()) == str(odd.tolist())
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(nan, torch.Generator()).isnan().all()


def test_at_rate_1e_6_nearest_rounding_loses_the_updates_and_stochastic_rounding_keeps_them_on_average():
    """An Adam step at a constant gradient moves a weight by the rate. In bf16 weights near 0.02 have a last digit of

    1.2e-4, 120 times that. Nearest rounding: fewer than 1 % move. Stochastic: mean movement over 262 144 weights within
    4 standard errors of the true one.
    """
    torch.manual_seed(0)
    start = (0.016 + 0.015 * torch.rand(512, 512)).bfloat16()
    gradient = torch.ones(512, 512)

    def moved(weight: nn.Parameter, num_steps: int, nearest: bool) -> torch.Tensor:
        wide = nn.Parameter(weight.detach().float())
        target = wide if nearest else weight
        optimizer = GroupedAdam8bit([{"params": [target], "lr": LR, "optim_bits": 32}], seed=1)
        for _ in range(num_steps):
            target.grad = gradient.to(target.dtype)
            optimizer.step()
            if nearest:
                wide.data = wide.data.bfloat16().float()
        return target.detach().double() - start.double()

    steps = 5
    lost = moved(nn.Parameter(start.clone()), steps, nearest=True)
    assert (lost != 0).double().mean() < 0.01
    kept = moved(nn.Parameter(start.clone()), steps, nearest=False)
    error = kept.std() / kept.numel() ** 0.5
    assert error < 0.1 * LR * steps, "the test can tell"
    assert (kept.mean() + LR * steps).abs() < 4 * error
    assert 0.02 < (kept != 0).double().mean() < 0.08, "about 5/120 of the weights moved, by a whole digit"


def test_channels_last_weights_stay_so_and_are_updated_as_contiguous_ones_are():
    """32-bit state, where the layout of the state's blocks plays no part, so the two must agree."""
    plain, last = network(), network(channels_last=True)
    strides = [p.stride() for p in last.parameters()]
    for module in (plain, last):
        optimizer = GroupedAdam8bit([{"params": list(module.parameters()), "lr": 1e-3, "optim_bits": 32}], seed=0)
        for number in range(3):
            loss(module, number).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [p.stride() for p in last.parameters()] == strides
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last) and not last[0].weight.is_contiguous()
    for p, q in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


def test_the_first_step_is_adams_on_every_layout():
    """After one step from zero state Adam moves each weight by the rate, against its gradient's sign."""
    for channels_last in (False, True):
        module = network(channels_last=channels_last)
        before = [p.detach().clone() for p in module.parameters()]
        loss(module, 0).backward()
        signs = [p.grad.sign() for p in module.parameters()]
        large = [p.grad.abs() > 1e-5 for p in module.parameters()]
        GroupedAdam8bit(groups(module, 1e-3), seed=0).step()
        for p, was, sign, clear in zip(module.parameters(), before, signs, large, strict=True):
            torch.testing.assert_close((p - was)[clear], (-1e-3 * sign)[clear], rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_backward_is_the_ordinary_step(dtype, channels_last):
    """Bit for bit, also where bf16 weights are rounded stochastically: a draw depends on nothing but its place."""
    ordinary, hooked = network(dtype, channels_last), network(dtype, channels_last)
    before = network(dtype, channels_last)
    run(ordinary, 3, lr=1e-3)
    run(hooked, 3, in_backward=True, lr=1e-3)
    assert same(ordinary, hooked) and not same(ordinary, before)
    assert all(p.grad is None for p in hooked.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_in_chunks_is_the_whole_step(monkeypatch, dtype, in_backward):
    """fp32 to the bit; bf16 in what is not rounded by chance: the moments after one step."""
    whole, cut = network(dtype), network(dtype)
    assert max(p.numel() for p in whole.parameters()) > 2 * BLOCK
    first = run(whole, 1, in_backward, lr=1e-3)
    monkeypatch.setattr(adam_bnb, "CHUNK", BLOCK)
    second = run(cut, 1, in_backward, lr=1e-3)
    if dtype == torch.float32:
        assert same(whole, cut)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        for name in ("state1", "state2", "absmax1", "absmax2", "step"):
            if name in first.state[a]:
                assert torch.as_tensor(first.state[a][name]).equal(torch.as_tensor(second.state[b][name])), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_with_one_bad_number_changes_no_chunk(monkeypatch, dtype, bad):
    monkeypatch.setattr(adam_bnb, "CHUNK", BLOCK)
    weight = nn.Parameter(torch.randn(64, 32).to(dtype))
    optimizer = GroupedAdam8bit([{"params": [weight], "lr": 1e-2, "optim_bits": 8}], seed=0)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    weight.grad[60, 3] = bad
    assert not optimizer.step_one(weight)
    assert weight.equal(before)
    weight.grad = torch.ones_like(weight)
    assert optimizer.step_one(weight)
    assert (weight != before).float().mean() > 0.9


def test_fp32_weights_are_bitsandbytes_own_step():
    import bitsandbytes

    ours, theirs = network(), network()
    run(ours, 4, lr=1e-3)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    rest = [p for p in theirs.parameters() if p.ndim <= 1]
    optimizers = (
        bitsandbytes.optim.Adam8bit(matrices, lr=1e-3),
        bitsandbytes.optim.Adam(rest, lr=1e-3, optim_bits=32),
    )
    for number in range(4):
        loss(theirs, number).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert same(ours, theirs)


def test_resumed_state_continues_with_the_same_draws():
    whole, parts = network(torch.bfloat16), network(torch.bfloat16)
    run(whole, 4, lr=1e-3)
    optimizer = run(parts, 2, lr=1e-3)
    resumed = GroupedAdam8bit(groups(parts, 1e-3), seed=7)
    resumed.load_state_dict(optimizer.state_dict())
    for number in (2, 3):
        loss(parts, number).backward()
        resumed.step()
        resumed.zero_grad()
    assert same(whole, parts)
