"""Adds adapters to a UNet and decides which weights train and in which type they are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out")

TARGETS = {"attention": _ATTENTION, "convolutions": (*_ATTENTION, *_CONVOLUTIONS)}
"""Choice of `--lora-targets` -> last words of the names of the layers that get an adapter."""


@torch.no_grad()
def add_adapters(unet: UNet2DConditionModel, rank: int, targets: str) -> None:
    """Put an adapter of `rank` beside each layer of `TARGETS[targets]`; at first it adds 0. Scale 1 (alpha = rank).

    The adapters are in fp32; they do not cast their inputs, so autocast decides the type of their arithmetic.
    """
    from peft import LoraConfig

    with unset_fake_temporarily():  # peft casts what it makes, which the planner's fake weights do not allow
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS[targets])))
    for layer in _adapted(unet):
        layer.cast_input_dtype_enabled = False
        for side in (layer.lora_A, layer.lora_B):
            for module in side.values():
                module.weight = nn.Parameter(torch.empty_like(module.weight, dtype=torch.float32).copy_(module.weight))


def _adapted(unet: nn.Module) -> Iterator[Any]:
    """The layers that have an adapter."""
    return (module for module in unet.modules() if hasattr(module, "lora_A"))


def has_adapters(unet: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return next(_adapted(unet), None) is not None


def whole_weight(layer: Any) -> torch.Tensor:
    """The weight of a layer, with what its active adapters add to it."""
    weight: torch.Tensor = layer.weight
    if hasattr(layer, "lora_A") and not layer.disable_adapters and not layer.merged:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def train(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let the adapters train, and nothing else; all weights if there are no adapters. Returns the UNet."""
    adapted = has_adapters(unet)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(not adapted or ".lora_" in name)
    return unet


@torch.no_grad()
def store_frozen(unet: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights that do not train in `dtype`."""
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def autocast_mixed(unet: UNet2DConditionModel) -> contextlib.AbstractContextManager[object]:
    """Autocast context for a UNet whose adapters are stored in another type than its frozen weights.

    It keeps no casts: a captured step would read them after the context has freed them.
    """
    types = {p.dtype for name, p in unet.named_parameters() if ".lora_" in name}
    if types - {unet.dtype}:
        return torch.autocast(unet.device.type, unet.dtype, cache_enabled=False)
    return contextlib.nullcontext()
