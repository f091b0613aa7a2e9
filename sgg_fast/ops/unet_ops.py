"""Normalisation and gate of the UNet and the VAE. Letters: B images, C channels, G groups, R rows, D width.

Values are fp32, fp16 or bf16 (float64 too on the reference), accumulated in fp32. Every floating argument has a
gradient. Under autocast the values keep their dtype, without torch's casts to fp32 and back.
"""

from __future__ import annotations

import torch
from sgg_kernels import reference

from . import unet_kernels
from .dispatch import backend_for
from .graph_ops import check


def group_norm_silu(
    x: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool = True,
    shift_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(x + shift))`, or the norm alone without `silu`: [B, C, ..] in the dtype of x, channels last.

    x: [B, C, any spatial dimensions], preferably channels last (else x is copied); weight, bias: [C]; G divides C.
    shift: [B, C] for all pixels of an image; it costs no pass over x.
    Statistics are accurate at any mean, because deviations are squared, not values. Raises ValueError if the shapes do
    not fit or x has no pixel.

    Equivalent PyTorch: `silu(group_norm(x + shift[:, :, None, None], num_groups, weight, bias, eps))`
    """
    name = "group_norm_silu"
    check(name, x.ndim >= 2, "x must be [B, C, ..]")
    check(name, weight_C.shape == bias_C.shape == x.shape[1:2], f"weight and bias must be [{x.shape[1]}]")
    check(name, num_groups > 0 and x.shape[1] % num_groups == 0, f"{num_groups} groups do not divide {x.shape[1]}")
    check(name, x.shape[1:].numel() > 0, "an image must have a pixel and a channel")
    check(name, shift_BC is None or shift_BC.shape == x.shape[:2], f"the shift must be {list(x.shape[:2])}")
    values = (x, weight_C, bias_C) if shift_BC is None else (x, weight_C, bias_C, shift_BC)
    check(name, all(value.device == x.device for value in values), f"all tensors must be on {x.device}")
    if backend_for(x.device, *(value.dtype for value in values)) == "reference":
        return reference.group_norm_silu(x, weight_C, bias_C, num_groups, eps, silu, shift_BC)
    spatial = x.shape[2:]
    x_BSC = x.flatten(2).transpose(1, 2) if spatial else x.unsqueeze(1)
    out_BSC, *_ = unet_kernels.group_norm_silu(x_BSC, shift_BC, weight_C, bias_C, num_groups, eps, silu)
    return out_BSC.transpose(1, 2).unflatten(2, spatial) if spatial else out_BSC.squeeze(1)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`a * gelu(gate)` with a | gate = x along the last dimension: x [.., 2D] -> [.., D] in the dtype of x.

    The gelu is exact (erf). Raises ValueError if the last dimension is odd.

    Equivalent PyTorch: `a, gate = x.chunk(2, -1); a * gelu(gate)`
    """
    check("geglu", x.ndim >= 1 and x.shape[-1] % 2 == 0, "the last dimension must be even: values and their gates")
    if backend_for(x.device, x.dtype) == "reference":
        return reference.geglu(x)
    return unet_kernels.geglu(x.flatten(0, -2) if x.ndim > 1 else x[None]).view(*x.shape[:-1], x.shape[-1] // 2)
