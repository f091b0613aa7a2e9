"""Flat parameters are the parameters, each in its own layout; matrices are those of the memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgg_fast.ops.adam import Weights, read_weights
from sgg_fast.train.optim.flat import PAD, FlatParameters, as_matrix, keep_low_halves, take_low_halves


def model(seed: int = 0) -> nn.Module:
    """Odd sizes, a scalar, a convolution in channels_last, and a weight that nothing uses."""
    torch.manual_seed(seed)
    made = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 5, 3), "norm": nn.GroupNorm(1, 5), "linear": nn.Linear(5, 300), "idle": nn.Linear(2, 2)}
    )
    made.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    made["conv"].to(memory_format=torch.channels_last)
    return made


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
    with pytest.raises(ValueError, match="not dense"):
        FlatParameters([nn.Parameter(torch.zeros(4, 4)[:, :2])])


def test_low_halves_are_those_of_the_fp32_weights():
    """Halves put together are the fp32 bits, in any layout; a NaN stays one; ties go where the kernels send them."""
    net = model()
    with torch.no_grad():
        net["conv"].weight[0, 0, 0] = torch.tensor([torch.nan, 1 + 2**-8, -1 - 2**-8])
    exact = {name: p.detach().clone() for name, p in net.named_parameters()}
    keep_low_halves(net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    flat = FlatParameters(net.parameters())
    lows = take_low_halves(flat)
    assert lows.dtype == torch.int16 and not any(hasattr(p, "low_half") for p in net.parameters())
    whole = read_weights(Weights(flat.buffer, lows), slice(None))
    for (name, p), offset in zip(net.named_parameters(), flat.offsets, strict=True):
        found = whole.as_strided(p.shape, p.stride(), offset)
        assert torch.equal(found.nan_to_num(7.0), exact[name].nan_to_num(7.0)), name
        if name == "conv.weight":
            assert lows.as_strided(p.shape, p.stride(), offset)[0, 0, 0, 1:].tolist() == [-(2**15)] * 2


def test_matrices_are_those_of_the_memory():
    conv = torch.empty(70, 8, 3, 3).to(memory_format=torch.channels_last)
    assert as_matrix(conv) == (70, 72) and as_matrix(torch.empty(70, 8, 1, 1)) == (70, 8)
    assert as_matrix(torch.empty(3, 5)) == (3, 5) and as_matrix(torch.empty(3, 5).t()) == (3, 5)
    assert as_matrix(torch.empty(1, 5)) == (5, 1) and as_matrix(torch.empty(1)) == (1, 1)
