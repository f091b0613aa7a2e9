"""bitsandbytes' 8-bit Adam: widths of the state by group, weights in any memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
from sgg_fast.train.optim.adam_bnb import GroupedAdam8bit

LR = 1e-3


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


def run(module: nn.Module, num_steps: int, lr: float = LR) -> GroupedAdam8bit:
    optimizer = GroupedAdam8bit(groups(module, lr))
    for number in range(num_steps):
        loss(module, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_channels_last_weights_stay_so_and_are_updated_as_contiguous_ones_are():
    """32-bit state, where the layout of the state's blocks plays no part, so the two must agree."""
    plain, last = network(), network(channels_last=True)
    strides = [p.stride() for p in last.parameters()]
    for module in (plain, last):
        optimizer = GroupedAdam8bit([{"params": list(module.parameters()), "lr": 1e-3, "optim_bits": 32}])
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
        GroupedAdam8bit(groups(module, 1e-3)).step()
        for p, was, sign, clear in zip(module.parameters(), before, signs, large, strict=True):
            torch.testing.assert_close((p - was)[clear], (-1e-3 * sign)[clear], rtol=0.02, atol=1e-7)


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
