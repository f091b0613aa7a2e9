"""Reference of `adam_blockwise`: Adam whose two moments are codes of 8 or 4 bits with one scale for each block.

8 bits: maps, blocks of 256 and arithmetic are bitsandbytes' (Dettmers et al., 2022, "8-bit optimizers via block-wise
quantization"), so that both can read each other's states. There is one difference: a second moment above 0 never
becomes 0. The first moment's map reaches four decades further down than the root of the second moment's map, so a
weight with a single zero gradient (behind a relu) would move by m / eps.
4 bits: maps and blocks of 128 are those of Li et al., 2023 ("Memory efficient optimizers with 4-bit states", section
4), which torchao's `AdamW4bit` has too: a signed dynamic map, and a linear one without zero for the second moment. Two
codes share a byte. torchao lets no scale fall below 1e-12, which is the second moment of a gradient of 3e-5; this form
does not.
Letters: P elements of the flat buffers, S elements of a block, R = P / S blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .adam import CORRECTION_1, CORRECTION_2, FACTOR, Hyper
from .weights import Weights, read_weights, write_weights

BLOCKS = {8: 256, 4: 128}
"""Elements of a block with one scale, by the bits of a code. Each parameter is padded to a multiple of 256."""

DECADES = {8: 7, 4: 3}
ZERO_1 = {8: 127, 4: 7}
"""The code of 0 in the signed map. Code 0 is the least value of the unsigned map: 0 in 8 bits, 1/16 in 4."""

LEAST_SCALE = 2.0**-126
"""Smallest normal number. A block with a smaller largest element is stored as zeros."""


@functools.cache
def dynamic_map(signed: bool, bits: int = 8) -> torch.Tensor:
    """The 2^bits values, ascending, fp32: 0, 1, and in each decade up to 1 the centres of equal parts.

    Decade d (from 0) has 2^d parts for each sign in the signed map, 2^(d + 1) in the unsigned map; -1 is missing. The
    unsigned map of 4 bits is 1/16, 2/16 .. 1.
    """
    if bits == 4 and not signed:
        return torch.arange(1, 17) / 16
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES[bits]):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        centres = 10.0 ** (decade + 1 - DECADES[bits]) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


class Moments(NamedTuple):
    """Both moments as codes: `value = map[code] * absmax of the block`."""

    code_1: torch.Tensor
    """uint8 [P], of the signed map; [P / 2] with 4 bits, an even element's code in a byte's upper half."""
    code_2: torch.Tensor
    """The same of the unsigned map."""
    absmax_1: torch.Tensor
    """[R] fp32."""
    absmax_2: torch.Tensor
    map_1: torch.Tensor
    """`dynamic_map(True, bits)`, fp32 [2^bits]."""
    map_2: torch.Tensor
    """`dynamic_map(False, bits)`."""

    @property
    def bits(self) -> int:
        """8 or 4."""
        return bits_of(self.map_1)


def bits_of(values: torch.Tensor) -> int:
    """Bits of the codes of a map."""
    return 4 if len(values) == 16 else 8


def read_codes(code: torch.Tensor, part: slice, bits: int) -> torch.Tensor:
    """The codes of the elements `part`, whose ends are even, uint8 [R, S]."""
    if bits == 4:
        byte = code[part.start // 2 : part.stop // 2]
        return torch.stack([byte >> 4, byte & 15], 1).view(-1, BLOCKS[4])
    return code[part].view(-1, BLOCKS[8])


def write_codes(code: torch.Tensor, part: slice, codes_RS: torch.Tensor, bits: int) -> None:
    """Write what `read_codes` reads."""
    if bits == 4:
        high, low = codes_RS.view(-1, 2).unbind(1)
        code[part.start // 2 : part.stop // 2] = (high << 4) | low
    else:
        code[part] = codes_RS.view(-1)


def dequantise(code_RS: torch.Tensor, absmax_R: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values of the codes, fp32 [R, S]."""
    return values[code_RS.int()] * absmax_R[:, None]


def quantise(x_RS: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [R, S], absmax [R]): each element's nearest value of the map; a tie goes to the lower value.

    In the unsigned map of 8 bits an element above 0 never gets the code of 0.
    """
    absmax_R = x_RS.abs().amax(1)
    inverse_R = torch.where(absmax_R < LEAST_SCALE, 0, 1 / absmax_R)
    codes = torch.bucketize(x_RS * inverse_R[:, None], middles(values), out_int32=True)
    if values[0] == 0:
        codes = torch.maximum(codes, (x_RS > 0).int())
    return codes.to(torch.uint8), absmax_R


def middles(values: torch.Tensor) -> torch.Tensor:
    """Middles between neighbours, each rounded down to fp32, so that an fp32 number is above both or above neither."""
    exact = (values[:-1].double() + values[1:].double()) / 2
    near = exact.float()
    return torch.where(near > exact, near.nextafter(near.new_tensor(-torch.inf)), near)


def adam_blockwise(
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
        part, blocks, g = blocks_of(grad, offset, moments.bits, control)
        m, v = (
            dequantise(read_codes(code, part, moments.bits), absmax[blocks], values)
            for code, absmax, values in zip(moments[:2], moments[2:4], moments[4:], strict=True)
        )
        m.mul_(hyper.beta_1).add_(g, alpha=1 - hyper.beta_1)
        v.mul_(hyper.beta_2).addcmul_(g, g, value=1 - hyper.beta_2)
        spread = v.sqrt().div_(control[CORRECTION_2].sqrt()).add_(hyper.eps)
        wide = read_weights(weights, part)
        write_weights(weights, part, wide - (rate[0] / control[CORRECTION_1] * m / spread).flatten(), step)
        for x, code, absmax, values in zip((m, v), moments[:2], moments[2:4], moments[4:], strict=True):
            codes, absmax[blocks] = quantise(x, values)
            write_codes(code, part, codes, moments.bits)


def blocks_of(grad: torch.Tensor, offset: int, bits: int, control: torch.Tensor) -> tuple[slice, slice, torch.Tensor]:
    """(elements, blocks, scaled gradient fp32 [R, S]) of all blocks that a gradient lies in; 0 beyond its end."""
    size = BLOCKS[bits]
    blocks = slice(offset // size, -(-(offset + grad.numel()) // size))
    g = torch.zeros(size * (blocks.stop - blocks.start), device=grad.device)
    g[: grad.numel()] = grad.float() * control[FACTOR]
    return slice(offset, offset + len(g)), blocks, g.view(-1, size)
