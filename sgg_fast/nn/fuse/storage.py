"""Convolution weights stored as [O, kH, kW, I], for owners of flat memory that keep no strides.

DeepSpeed's flat buffers give each weight back contiguous. A fused UNet's images are channels last, so cuDNN would copy
each contiguous [O, I, kH, kW] weight to that layout, forward and backward. Stored so, the weight that the convolution
sees has the layout of its images. state_dicts keep the stock shape, so files do not change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class StoredConv2d(nn.Conv2d):
    """A convolution whose `weight` is [O, kH, kW, I]."""

    def kernel(self) -> torch.Tensor:
        """The weight as [O, I, kH, kW], channels last; a view."""
        return self.weight.permute(0, 3, 1, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, O, h, w]."""
        return F.conv2d(input, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        if destination[name].ndim == 4:  # ZeRO-3 leaves an empty tensor
            destination[name] = destination[name].permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].ndim == 4:
            state_dict[name] = state_dict[name].permute(0, 2, 3, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def kernel_of(layer: nn.Conv2d) -> torch.Tensor:
    """The weight as [O, I, kH, kW]."""
    return layer.kernel() if type(layer) is StoredConv2d else layer.weight


def store_channels_last(model: nn.Module) -> None:
    """Store the weights of the model's plain convolutions as [O, kH, kW, I]; the parameters stay the same objects."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.weight.data = module.weight.data.permute(0, 2, 3, 1).contiguous()
            module.__class__ = StoredConv2d


def store_stock(model: nn.Module) -> None:
    """Undo `store_channels_last`; the weights then are channels last."""
    for module in model.modules():
        if type(module) is StoredConv2d:
            module.weight.data = module.kernel().data
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
