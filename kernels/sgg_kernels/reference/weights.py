"""Reference of the optimiser kernels' access to weights: read as fp32, write back. Letters: P elements."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .hash import hash_u32


class Weights(NamedTuple):
    """Weights in one flat buffer, in one of three forms: fp32; bf16 with the low halves of fp32; bf16 alone."""

    param: torch.Tensor
    """[P] fp32 or bf16."""
    low: torch.Tensor | None = None
    """[P] int16: fp32 bits = (bf16 bits << 16) + this. The bf16 number is the one nearest to the fp32 number."""
    seed: int = 0
    """Seed of stochastic rounding, for bf16 alone; below 2^31."""


def read_weights(weights: Weights, part: slice) -> torch.Tensor:
    """The elements `part` in fp32."""
    param = weights.param[part]
    if weights.low is None:
        return param.float()
    return ((param.view(torch.int16).int() << 16) + weights.low[part]).view(torch.float32)


def write_weights(weights: Weights, part: slice, wide: torch.Tensor, step: torch.Tensor) -> None:
    """Write fp32 numbers in the buffer's form.

    bf16 alone is rounded stochastically, with an exact expectation: 16 random bits are added below bf16's last bit,
    then cut off. The bits are a hash of seed, step and the element's index in the buffer.
    """
    param = weights.param[part]
    if param.dtype == torch.float32:
        param.copy_(wide)
        return
    bits = wide.view(torch.int32)
    if weights.low is not None:
        # A NaN stays NaN: a GPU's NaN is 0x7FFFFFFF, which would carry into the sign and become -0.
        high = (bits + torch.where(wide.isnan(), 0, 0x8000).int()) >> 16
        weights.low[part] = (bits - (high << 16)).to(torch.int16)
    else:
        place = torch.arange(part.start, part.stop, device=param.device)
        drawn = hash_u32(weights.seed, step, place) & 0xFFFF
        high = (bits + torch.where(wide.isfinite(), drawn, 0).int()) >> 16
    param.copy_(high.to(torch.int16).view(torch.bfloat16))
