"""Adapters of a UNet: where they lie, what trains, how they are stored, and their weight as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgg_fast.nn import lora
from sgg_fast.toy.models import toy_unet


def adapted(unet) -> set[str]:
    return {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}


def random(unet) -> None:
    for name, parameter in unet.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def test_every_projection_of_attention_and_every_convolution_of_a_block_has_one():
    attention, both = toy_unet(), toy_unet()
    lora.add_adapters(attention, 2, "attention")
    lora.add_adapters(both, 2, "convolutions")
    plain = dict(toy_unet().named_modules())
    projections = {name for name in plain if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    convolutions = {name for name, module in plain.items() if type(module) is nn.Conv2d} - {"conv_in", "conv_out"}
    assert adapted(attention) == projections and adapted(both) == projections | convolutions


def test_they_add_nothing_at_first_and_alone_they_train():
    unet, plain = toy_unet(), toy_unet()
    unet.load_state_dict(plain.state_dict())
    lora.add_adapters(unet, 2, "convolutions")
    z, context = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 128)
    assert torch.equal(unet(z, 9, context).sample, plain(z, 9, context).sample)
    assert lora.train(unet) is unet and lora.has_adapters(unet) and not lora.has_adapters(plain)
    assert all(p.requires_grad == (".lora_" in name) for name, p in unet.named_parameters())
    assert all(p.requires_grad for p in lora.train(plain.requires_grad_(False)).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_weights_in_half_precision_compute_under_autocast(dtype):
    unet = toy_unet()
    lora.add_adapters(unet, 2, "attention")
    random(unet)
    z, context = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 128)
    exact = unet(z, 9, context).sample
    lora.store_frozen(lora.train(unet), dtype)
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {dtype}
    with lora.autocast_mixed(unet):
        assert torch.is_autocast_enabled("cpu")
        found = unet(z.to(dtype), 9, context.to(dtype)).sample
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    with lora.autocast_mixed(toy_unet()):
        assert not torch.is_autocast_enabled("cpu"), "without adapters nothing changes"


@torch.no_grad()
def test_the_whole_weight_is_what_the_layer_computes_with():
    unet = toy_unet()
    lora.add_adapters(unet, 2, "attention")
    random(unet)
    layer, x = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k, torch.randn(3, 128)
    torch.testing.assert_close(x @ lora.whole_weight(layer).T, layer(x))
    with_adapter = lora.whole_weight(layer)
    unet.disable_adapters()
    assert torch.equal(x @ lora.whole_weight(layer).T, layer(x)) and not torch.equal(layer.weight, with_adapter)
    assert lora.whole_weight(unet.conv_in) is unet.conv_in.weight
