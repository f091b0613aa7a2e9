"""Convolutions stored as [O, kH, kW, I]: the same numbers, stock shapes in every file, and back again."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sgg_fast.nn import fuse
from sgg_fast.nn.fuse.storage import StoredConv2d, store_channels_last, store_stock


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
    )


def run(model: UNet2DConditionModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output, and gradients in stock shapes."""
    generator = torch.Generator().manual_seed(1)
    z, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    out = model(z, torch.tensor([3, 700]), context).sample
    out.square().sum().backward()
    stored = {f"{name}.weight" for name, module in model.named_modules() if type(module) is StoredConv2d}
    grads = {n: p.grad.permute(0, 3, 1, 2) if n in stored else p.grad for n, p in model.named_parameters()}
    return out.detach(), grads


@pytest.mark.parametrize("merge", [True, False])
def test_a_stored_model_computes_what_a_channels_last_one_does(merge):
    model = unet()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fuse.fuse(model, merge)
    fuse.fuse(other, merge)
    store_channels_last(model)
    assert sum(type(module) is StoredConv2d for module in model.modules()) > 10
    (out, grads), (expected, wanted) = run(model), run(other)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], atol=1e-4, rtol=1e-4)
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in model.parameters()), "as a flat buffer has them"


def test_files_have_stock_shapes(tmp_path):
    """Saved by diffusers, loaded by it; and a stock state loads into a stored model."""
    model, fresh = unet(), unet()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    fuse.fuse(model)
    store_channels_last(model)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == stock.keys() and all(torch.equal(loaded[name], stock[name]) for name in stock)
    fuse.fuse(fresh)
    store_channels_last(fresh)
    fresh.load_state_dict(stock)
    assert torch.equal(run(fresh)[0], run(model)[0])


def test_unfusing_gives_stock_layers_back():
    model, stock = unet(), unet()
    fuse.fuse(model)
    store_channels_last(model)
    fuse.unfuse(model)
    assert not any(type(module) is StoredConv2d for module in model.modules())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    torch.testing.assert_close(run(model)[0], run(stock)[0])


def test_a_convolution_with_other_padding_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3))
    store_channels_last(model)
    assert [type(layer) for layer in model] == [nn.Conv2d, StoredConv2d]
    store_stock(model)
    assert model[1].weight.shape == (4, 4, 3, 3)
