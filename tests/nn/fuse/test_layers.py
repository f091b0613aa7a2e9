"""Each fused layer against the stock layer of diffusers in whose place it is: output and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from support.nn.unets import Results, assert_same, randn, sd_unet, unet_results
from torch import nn

from sgg_fast import ops
from sgg_fast.nn.attention import checkpoint_activations
from sgg_fast.nn.fuse import fuse
from sgg_fast.nn.fuse.layers import (
    FusedBasicTransformerBlock,
    FusedGEGLU,
    FusedGroupNorm,
    FusedGroupNormSiLU,
    FusedLayerNorm,
    FusedResnetBlock2D,
    FusedTransformer2DModel,
    LateLinear,
    One,
    PassThrough,
    may_wait,
)
from sgg_fast.nn.fuse.storage import StoredConv2d, store_channels_last


def results(module: nn.Module, dtype: torch.dtype, *inputs: torch.Tensor) -> Results:
    """Output and every gradient of a call."""
    module.zero_grad()
    given = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = module(*given)
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.backward(randn(9, *out.shape).to(out))
    own = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), **{f"grad of input {i}": x.grad for i, x in enumerate(given)}, **own}


def as_trained(module: nn.Module) -> nn.Module:
    """Norms whose weights and biases are not 1 and 0."""
    for k, part in enumerate(module.modules()):
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.weight.data = 1 + 0.2 * randn(k, *part.weight.shape)
            part.bias.data = 0.2 * randn(k + 100, *part.bias.shape)
    return module


class Late(nn.Module):
    """The sum of a stream, a layer's result and the layer's bias, normalised: as behind an attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.norm, self.fused = nn.Linear(6, 8), nn.LayerNorm(8), fused
        if fused:
            self.last.__class__, self.norm.__class__ = LateLinear, FusedLayerNorm

    def forward(self, x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        if not self.fused:
            total = stream + self.last(x)
            return torch.cat([self.norm(total), total], dim=-1)
        self.last.taken = True
        normal, total = self.norm(self.last(x), stream, self.last.bias, beside=True)
        assert not self.last.taken, "for one call"
        return torch.cat([normal, total], dim=-1)


class Shifted(nn.Module):
    """A norm and SiLU of images + shift, and what goes past the norm."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = nn.GroupNorm(2, 6), fused
        if fused:
            self.norm.__class__ = FusedGroupNormSiLU

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        if not self.fused:
            return torch.cat([nn.functional.silu(self.norm(x + shift[:, :, None, None])), x])
        return torch.cat(self.norm(x, shift, beside=True))


def become(module: nn.Module) -> nn.Module:
    """The same module with the fused classes, each chosen by its stock class."""
    fused = {nn.GroupNorm: FusedGroupNorm, nn.LayerNorm: FusedLayerNorm, GEGLU: FusedGEGLU,
             BasicTransformerBlock: FusedBasicTransformerBlock, ResnetBlock2D: FusedResnetBlock2D,
             Transformer2DModel: FusedTransformer2DModel}  # fmt: skip
    for part in module.modules():
        if type(part) in fused:
            part.__class__ = fused[type(part)]
            if type(part) is FusedResnetBlock2D:
                part.norm1.__class__ = part.norm2.__class__ = FusedGroupNormSiLU
    return module


def resnet(wide: bool) -> nn.Module:
    return ResnetBlock2D(in_channels=8, out_channels=12 if wide else 8, temb_channels=5, groups=2)


def transformer(**settings: bool) -> nn.Module:
    return Transformer2DModel(2, 4, 8, norm_num_groups=2, cross_attention_dim=8, **settings)


LAYERS = {
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(8), (2, 5, 8)),
    "gated unit": (lambda: GEGLU(6, 8), (2, 5, 6)),
    "residual block": (lambda: resnet(False), (2, 8, 4, 4), (2, 5)),
    "residual block with a shortcut": (lambda: resnet(True), (2, 8, 4, 4), (2, 5)),
    "transformer block": (lambda: BasicTransformerBlock(8, 2, 4, cross_attention_dim=8), (2, 5, 8)),
    "transformer": (transformer, (2, 8, 4, 4)),
    "transformer by linear maps": (lambda: transformer(use_linear_projection=True), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_the_stock_one_does(name):
    make, *shapes = LAYERS[name]
    torch.manual_seed(0)
    stock = as_trained(make())
    fused, inputs = become(copy.deepcopy(stock)), [randn(i, *shape) for i, shape in enumerate(shapes)]
    assert type(fused) is not type(stock) and list(fused.state_dict()) == list(stock.state_dict())
    found, low = results(fused, torch.float32, *inputs), results(stock, torch.float32, *inputs)
    assert_same(found, low, results(copy.deepcopy(stock).double(), torch.float64, *inputs))


@pytest.mark.parametrize(("kind", "shapes"), [(Late, [(2, 5, 6), (2, 5, 8)]), (Shifted, [(2, 6, 4, 4), (2, 6)])])
def test_a_norm_adds_what_is_left_to_it_and_gives_back_what_goes_past(kind, shapes):
    stock, fused, inputs = kind(False), kind(True), [randn(i, *shape) for i, shape in enumerate(shapes)]
    found, low = results(fused, torch.float32, *inputs), results(stock, torch.float32, *inputs)
    assert_same(found, low, results(copy.deepcopy(stock).double(), torch.float64, *inputs))


def test_norms_of_one_call_leave_their_sums_in_one_slot():
    """Outside of a call there is none; inside, weight and bias get the same gradients by it."""
    norm, x = FusedLayerNorm(8), randn(0, 2, 5, 8)
    assert norm.slot() is None
    norm(x).square().sum().backward()
    expected = norm.weight.grad.clone(), norm.bias.grad.clone()
    norm.zero_grad()
    norm.column_sums = ops.ColumnSums()
    norm.column_sums.begin([norm.weight, norm.bias])
    assert norm.slot() is not None
    out = norm(x)
    norm.column_sums.end()
    out.square().sum().backward()
    torch.testing.assert_close((norm.weight.grad, norm.bias.grad), expected)


def test_a_bias_waits_only_where_nobody_looks_at_the_convolution():
    plain, stored = nn.Conv2d(2, 3, 3), nn.Sequential(nn.Conv2d(2, 3, 3))
    store_channels_last(stored)
    assert may_wait(plain) and type(stored[0]) is StoredConv2d and may_wait(stored[0])
    others = [nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 3, 3, dilation=2)]
    assert not any(map(may_wait, [*others, nn.Conv2d(2, 3, 3, padding_mode="reflect"), nn.Linear(2, 3)]))
    plain.register_forward_hook(lambda *_: None)
    assert not may_wait(plain)


def test_an_identity_and_a_scale_of_one_give_the_same_tensor():
    x = torch.ones(2)
    assert x / One() is x and PassThrough()(x) is x


def test_checkpointed_activations():
    unet = sd_unet()
    fuse(unet)
    plain = unet_results(unet)
    checkpoint_activations(unet)
    unet.train()
    found = unet_results(unet)
    exact = unet_results(sd_unet().double(), torch.float64)
    assert_same(found, plain, exact)
