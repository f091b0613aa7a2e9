"""Reference of `adam8bit`: Adam whose two moments are 8-bit codes with one scale for each block of 256 elements.

Maps, blocks and arithmetic are bitsandbytes' (Dettmers et al., 2022, "8-bit optimizers via block-wise quantization"),
so that both can read each other's states. There is one difference: a second moment above 0 never becomes 0. The first
moment's map reaches four decades further down than the root of the second moment's map, so a weight with a single
zero gradient (behind a relu) would move by m / eps. Letters: P elements of the flat buffers, R = P / 256 blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .adam import CORRECTION_1, CORRECTION_2, FACTOR, Hyper
from .weights import Weights, read_weights, write_weights

BLOCK_8BIT = 256
"""Elements of a block with one scale. Each parameter is padded to a multiple of it in the buffers."""

DECADES = 7
ZERO_1, ZERO_2 = 127, 0
"""The codes of 0 in the signed and in the unsigned map."""

LEAST_SCALE = 2.0**-126
"""Smallest normal number. A block with a smaller largest element is stored as zeros."""


@functools.cache
def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values, ascending, fp32 [256]: 0, 1, and in each decade 10^-7 .. 1 the centres of equal parts.

    Decade d (from 0) has 2^d parts for each sign in the signed map, 2^(d + 1) in the unsigned map; -1 is missing.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        centres = 10.0 ** (decade + 1 - DECADES) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


class Moments(NamedTuple):
    """Both moments in 8 bits: `value = map[code] * absmax of the block`."""

    code_1: torch.Tensor
    """[P] uint8, of the signed map."""
    code_2: torch.Tensor
    """[P] uint8, of the unsigned map."""
    absmax_1: torch.Tensor
    """[R] fp32."""
    absmax_2: torch.Tensor
    map_1: torch.Tensor
    """`dynamic_map(True)`, fp32 [256]."""
    map_2: torch.Tensor
    """`dynamic_map(False)`."""


def dequantise(code_R256: torch.Tensor, absmax_R: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values of the codes, fp32 [R, 256]."""
    return values[code_R256.int()] * absmax_R[:, None]


def quantise(x_R256: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [R, 256], absmax [R]): each element's nearest value of the map; a tie goes to the lower value.

    In the unsigned map an element above 0 never gets the code of 0.
    """
    absmax_R = x_R256.abs().amax(1)
    inverse_R = torch.where(absmax_R < LEAST_SCALE, 0, 1 / absmax_R)
    codes = torch.bucketize(x_R256 * inverse_R[:, None], _middles(values), out_int32=True)
    if values[0] == 0:
        codes = torch.maximum(codes, (x_R256 > 0).int())
    return codes.to(torch.uint8), absmax_R


def _middles(values: torch.Tensor) -> torch.Tensor:
    """Middles between neighbours, each rounded down to fp32, so that an fp32 number is above both or above neither."""
    exact = (values[:-1].double() + values[1:].double()) / 2
    near = exact.float()
    return torch.where(near > exact, near.nextafter(near.new_tensor(-torch.inf)), near)


def adam8bit(
    weights: Weights,
    moments: Moments,
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Apply the step that `reference.adam.adam_decide` decided on, in place. grads: [n] each, fp32 or bf16.

    offsets: index of each gradient's first element in the flat buffers, a multiple of 256. rate: its first element is
    the learning rate. The weights are updated from the moments before quantisation.
    """
    for grad, offset in zip(grads, offsets, strict=True):
        num, blocks = grad.numel(), slice(offset // BLOCK_8BIT, -(-(offset + grad.numel()) // BLOCK_8BIT))
        part = slice(BLOCK_8BIT * blocks.start, BLOCK_8BIT * blocks.stop)
        g = torch.zeros(part.stop - part.start, device=grad.device)
        g[:num] = grad.float() * control[FACTOR]
        g = g.view(-1, BLOCK_8BIT)
        code_1, code_2 = (code[part].view(-1, BLOCK_8BIT) for code in moments[:2])
        absmax_1, absmax_2 = (absmax[blocks] for absmax in moments[2:4])
        m = dequantise(code_1, absmax_1, moments.map_1).mul_(hyper.beta_1).add_(g, alpha=1 - hyper.beta_1)
        v = dequantise(code_2, absmax_2, moments.map_2).mul_(hyper.beta_2).addcmul_(g, g, value=1 - hyper.beta_2)
        spread = v.sqrt().div_(control[CORRECTION_2].sqrt()).add_(hyper.eps)
        wide = read_weights(weights, part)
        write_weights(weights, part, wide - (rate[0] / control[CORRECTION_1] * m / spread).flatten(), step)
        for code, absmax, (codes, largest) in (
            (code_1, absmax_1, quantise(m, moments.map_1)),
            (code_2, absmax_2, quantise(v, moments.map_2)),
        ):
            code.copy_(codes)
            absmax.copy_(largest)
