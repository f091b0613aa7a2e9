"""Weights of merged layers stay end to end through whatever moves them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from sgg_fast.config import OptimConfig
from sgg_fast.nn.fuse import _STATE, fuse, merged_first, unfuse
from sgg_fast.nn.merge import Merged, adjacent
from sgg_fast.train.optim.flat import FlatParameters
from sgg_fast.train.optim.groups import parameter_groups

KINDS = {"self-attention", "context", "time"}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Fused, every weight of a merged layer a multiple of 256 elements, as SD v1.4's are."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    fuse(unet)
    return unet


def groups(unet: UNet2DConditionModel) -> dict[str, list[Merged]]:
    """The merged GEMMs by what they read."""
    state = unet.__dict__[_STATE]
    found: dict[str, list[Merged]] = {"self-attention": state.leading, "context": [], "time": []}
    for merged in state.shared:
        found["context" if merged.activation is None else "time"].append(merged)
    assert found.keys() == KINDS and all(found.values())
    return found


def apart(unet: UNet2DConditionModel) -> list[str]:
    """The kinds of which a GEMM would have to concatenate."""
    return [
        kind
        for kind, all_merged in groups(unet).items()
        for merged in all_merged
        if not all(adjacent(parameters) for parameters in merged.parameters)
    ]


MOVES = {
    "cast": lambda unet: unet.bfloat16(),
    "cast there and back": lambda unet: unet.double().float(),
    "moved, channels last": lambda unet: unet.to(memory_format=torch.channels_last, dtype=torch.bfloat16),
    "as part of another module": lambda unet: torch.nn.ModuleList([unet]).to(torch.bfloat16),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_moved_model_has_its_weights_end_to_end_before_the_next_call(unet, move):
    assert apart(unet) == []
    move(unet)
    assert apart(unet) == []


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_so_a_flat_buffer_keeps_them_and_no_forward_concatenates(unet, move, monkeypatch):
    """The optimisers flatten what was moved before: matrices in one buffer, the rest in another."""
    move(unet)
    parameters = list(unet.parameters())
    for matrices, pad in ((True, 256), (False, 16)):
        FlatParameters([p for p in parameters if (p.ndim >= 2) == matrices], pad)
    assert apart(unet) == []
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *a, **k: joined.append(len(tensors)) or cat(tensors, *a, **k))
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16)
    unet(z.to(unet.dtype), 10, context.to(unet.dtype))
    assert all(num == 2 for num in joined), "skip connections only"


def test_a_half_moved_group_is_left_alone(unet):
    """Until the last of them is there, nothing can be joined; then a cast of all joins them, the values kept."""
    merged = groups(unet)["self-attention"][0]
    before = [layer.weight.detach().clone() for layer in merged.layers]
    merged.layers[0].double()
    assert not adjacent(merged.parameters[0])
    unet.double()
    assert adjacent(merged.parameters[0])
    assert all(torch.equal(layer.weight, was.double()) for layer, was in zip(merged.layers, before, strict=True))


def flatten_as_deepspeed(module: torch.nn.Module, most: float) -> None:
    """ZeRO 1 and 2: the weights of each group become views of one tensor, in the group's order."""
    for group in parameter_groups(module, OptimConfig(), most):
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        for p, part in zip(group["params"], flat.split([p.numel() for p in group["params"]]), strict=True):
            p.data = part.view(p.shape)


def test_flat_tensors_of_groups_keep_merged_weights_end_to_end(unet):
    module = torch.nn.ModuleDict({"unet": unet})
    flatten_as_deepspeed(module, math.inf)
    assert set(apart(unet)) == {"context", "time"}, "merged across blocks, so apart in the model's own order"
    flatten_as_deepspeed(module, 10**9)
    assert apart(unet) == []


def test_the_order_of_groups_does_not_depend_on_fusing(unet):
    """A run may resume with another --fuse-unet."""
    fused = [id(p) for p in merged_first(unet)]
    assert len(fused) == len(list(unet.parameters()))
    unfuse(unet)
    assert [id(p) for p in merged_first(unet)] == fused
