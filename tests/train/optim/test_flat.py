"""Flat parameters are the parameters; the flat Adam is torch's, in an engine and through a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgg_fast.train.optim.flat import PAD, FlatAdam, FlatParameters


def model(seed: int = 0) -> nn.Module:
    """Odd sizes, a scalar, a convolution in channels_last, and a weight that nothing uses."""
    torch.manual_seed(seed)
    made = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 5, 3), "norm": nn.GroupNorm(1, 5), "linear": nn.Linear(5, 300), "idle": nn.Linear(2, 2)}
    )
    made.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    made["conv"].to(memory_format=torch.channels_last)
    return made


def loss(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
    h = net["norm"](net["conv"](x)).mean((2, 3))
    return (net["linear"](h) * net.scale - step % 3).square().mean()


def test_parameters_become_views_of_one_buffer():
    net, before = model(), model().state_dict()
    strides = [p.stride() for p in net.parameters()]
    flat = FlatParameters(net.parameters())
    assert [p.stride() for p in net.parameters()] == strides and net["conv"].weight.stride() != (27, 9, 3, 1)
    for (name, parameter), offset in zip(net.named_parameters(), flat.offsets, strict=True):
        assert torch.equal(parameter, before[name]) and offset % PAD == 0
        assert parameter.data_ptr() == flat.buffer.data_ptr() + 4 * offset
    assert flat.buffer.count_nonzero() == sum(p.count_nonzero() for p in net.parameters()), "padding holds zeros"
    flat.buffer.fill_(2.0)
    assert all((p == 2).all() for p in net.parameters())


def test_flat_weights_save_and_load(tmp_path):
    net = model()
    flat = FlatParameters(net.parameters())
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    other = model(seed=1)
    FlatParameters(other.parameters())
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    net.load_state_dict(model(seed=1).state_dict())
    places = [flat.buffer[offset:].data_ptr() for offset in flat.offsets]
    assert [p.data_ptr() for p in net.parameters()] == places, "loading copies into the buffer"


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_is_torchs_adam_over_many_steps(max_norm):
    """200 steps, the rate changing; the difference stays at rounding (torch's own foreach form differs as much)."""
    net, other = model(), model()
    ours, theirs = FlatAdam(net.parameters(), 1e-2, max_norm), torch.optim.Adam(other.parameters(), 1e-2)
    clipped = 0
    for step in range(200):
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (1 + step % 4)
        for one, optimizer in ((net, ours), (other, theirs)):
            loss(one, step).backward()
            if optimizer is theirs and max_norm:
                clipped += bool(nn.utils.clip_grad_norm_(other.parameters(), max_norm) > max_norm)
            optimizer.step()
            optimizer.zero_grad()
    assert ours.num_steps.item() == 200 and ours.applied == 1
    assert clipped > 50 or not max_norm
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    start = dict(model().named_parameters())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start) - {"idle.weight", "idle.bias"}, "without a gradient nothing moves, the rest does"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    net = model()
    optimizer = FlatAdam(net.parameters(), 1e-2, 1.0)
    loss(net, 0).backward()
    optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer.moments, optimizer.num_steps))
    corrections = optimizer.control[2:4].clone()
    net.zero_grad()
    loss(net, 1).backward()
    net.scale.grad.fill_(bad)
    optimizer.step()
    assert optimizer.applied == 0
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    assert all(map(torch.equal, optimizer.moments, before[1])) and torch.equal(optimizer.num_steps, before[2])
    assert torch.equal(optimizer.control[2:4], corrections)


def test_state_round_trip_is_bit_for_bit(tmp_path):
    net, other = model(), model()
    first, second = FlatAdam(net.parameters(), 1e-2, 1.0), FlatAdam(other.parameters(), 1e-2, 1.0)

    def run(one: nn.Module, optimizer: FlatAdam, steps: range) -> None:
        for step in steps:
            loss(one, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    run(net, first, range(7))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(net.state_dict())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(net, first, range(7, 12))
    run(other, second, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_gradients_in_another_layout_are_put_right():
    net = model()
    flat = FlatParameters(net.parameters())
    weight = net["linear"].weight
    wanted = torch.arange(1500.0).view(300, 5)
    weight.grad = wanted.t().contiguous().t()
    (grad,), _ = flat.gradients()
    assert torch.equal(grad, wanted.flatten())
    shifted = torch.cat([torch.zeros(1), wanted.flatten()])[1:].view(300, 5)
    weight.grad = shifted
    (grad,), _ = flat.gradients()
    assert torch.equal(grad, wanted.flatten()) and grad.data_ptr() % 16 == 0


def test_the_stride_of_a_single_row_moves_nothing():
    """1 x 1 convolutions in channels_last, whose gradients come with other strides for the same order."""
    parameter = nn.Parameter(torch.randn(6, 4, 1, 1).to(memory_format=torch.channels_last))
    parameter.grad = torch.randn(6, 4, 1, 1)
    assert parameter.grad.stride() != parameter.stride()
    flat = FlatParameters([parameter])
    (grad,), _ = flat.gradients()
    assert grad.data_ptr() == parameter.grad.data_ptr() and torch.equal(grad, parameter.grad.flatten())


def test_refused():
    half = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    for mixed in ([], [half, nn.Parameter(torch.zeros(3))], [nn.Parameter(torch.zeros(3).half())]):
        with pytest.raises(ValueError, match="all in fp32 or all in bf16"):
            FlatParameters(mixed)
    with pytest.raises(ValueError, match="must be in fp32"):
        FlatAdam([half], 1e-3)
    with pytest.raises(ValueError, match="not dense"):
        FlatParameters([nn.Parameter(torch.zeros(4, 4)[:, :2])])
