"""Shared by forward and backward of `group_norm_silu`: the cut of an image into programs, and device functions.

Letters: B images, S pixels of an image, C channels, G groups.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

ONE_PASS_PIXELS = 1024
"""Most pixels of the single launch: 32 x 32, the UNet's largest at 256 x 256. 40 columns take 80 KB, 120 take 240."""

ONE_PASS_CHANNELS = 128
"""Most columns of a program, which finds its groups by comparing every pair of channels."""

TILE = 4096
"""Elements of a tile; the registers of 8 warps hold two accumulators of that size."""

CHUNK_PIXELS, MAX_CHUNKS = 128, 512
"""Fewest pixels of a chunk, most chunks of an image."""


@triton.jit
def group_sum(b_C, o_C, SIZE: tl.constexpr):
    """Each channel's sum over its group, fp32 [BLOCK_C]; the tile starts where a group starts."""
    group = o_C // SIZE
    return tl.sum(tl.where(group[:, None] == group[None, :], b_C[None, :], 0.0), axis=1)


@triton.jit
def normalised(p_x, i_S, C, o_C, m_SC, mean_C, rstd_C):
    """(x - mean) / deviation, fp32 [BLOCK_S, BLOCK_C]."""
    b_x = tl.load(p_x + i_S[:, None] * C + o_C[None, :], mask=m_SC, other=0.0).to(tl.float32)
    return (b_x - mean_C[None, :]) * rstd_C[None, :]


@triton.jit
def channel_values(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i_b, C, o_C, m_C):
    """(mean, 1 / deviation, weight, bias) of the channels of image i_b, fp32 [BLOCK_C] each."""
    mean_C = tl.load(mean_ptr + i_b * C + o_C, mask=m_C, other=0.0)
    rstd_C = tl.load(rstd_ptr + i_b * C + o_C, mask=m_C, other=0.0)
    weight_C = tl.load(weight_ptr + o_C, mask=m_C, other=0.0).to(tl.float32)
    bias_C = tl.load(bias_ptr + o_C, mask=m_C, other=0.0).to(tl.float32)
    return mean_C, rstd_C, weight_C, bias_C


@functools.cache
def groups_of_program(num_groups: int, size: int) -> int:
    """Number of whole groups in one program of the single launch; 0 if one group does not fit.

    The number is the smallest (for the most programs) with at least 32 channels, so that a row is two sectors at bf16,
    and a multiple of 8 channels, so that a row starts on 16 bytes. Otherwise as many groups as fit.
    """
    fitting = [k for k in range(1, num_groups + 1) if num_groups % k == 0 and k * size <= ONE_PASS_CHANNELS]
    aligned = [k for k in fitting if k * size >= 32 and k * size % 8 == 0]
    return min(aligned) if aligned else max(fitting, default=0)


def _tile(num_pixels: int, block_c: int, elements: int) -> dict[str, int]:
    """BLOCK_S, BLOCK_C and warps: 16 elements a thread; BLOCK_S does not exceed the number of pixels."""
    block_s = max(1, min(triton.next_power_of_2(max(num_pixels, 1)), elements // block_c))
    return {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": max(1, block_s * block_c // 512)}


@dataclasses.dataclass(frozen=True)
class NormLayout:
    """The cut of an input into programs; a function of its shape alone."""

    images: int
    pixels: int
    channels: int
    size: int
    """C / G."""

    @classmethod
    def of(cls, x_BSC: torch.Tensor, num_groups: int) -> NormLayout:
        """The layout of x with `num_groups` groups."""
        images, pixels, channels = x_BSC.shape
        return cls(images, pixels, channels, channels // num_groups)

    @property
    def whole(self) -> int:
        """Channels of a program of the single launch; 0 if the launches are split."""
        if self.pixels > ONE_PASS_PIXELS:
            return 0
        return groups_of_program(self.channels // self.size, self.size) * self.size

    @property
    def whole_grid(self) -> tuple[int]:
        """Grid of the single launch."""
        return (self.images * (self.channels // self.whole),)

    @property
    def whole_options(self) -> dict[str, int]:
        """Options of the single launch. The groups of 128 channels need twice the registers, so twice the warps."""
        blocks = _tile(self.pixels, triton.next_power_of_2(self.whole), TILE)
        if blocks["BLOCK_C"] == ONE_PASS_CHANNELS:
            blocks["num_warps"] *= 2
        return {"CHANNELS": self.whole, "SIZE": self.size, **blocks}

    def staged(self, stages: int) -> dict[str, int]:
        """Options of the single launch with `stages` tiles in flight, plus one.

        One tile needs no stages, and 16 warps have enough in flight without them and half of the registers each.
        Without a bound ptxas aims at a higher occupancy than the grid can use, and spills a few words.
        """
        blocks = self.whole_options
        if blocks["num_warps"] == 16 or self.pixels <= blocks["BLOCK_S"]:
            stages = 1
        return {"STAGES": stages, "maxnreg": 128 if blocks["num_warps"] == 16 else 255}

    @property
    def chunk(self) -> int:
        """Pixels of a chunk."""
        return max(CHUNK_PIXELS, triton.cdiv(triton.cdiv(self.pixels, MAX_CHUNKS), CHUNK_PIXELS) * CHUNK_PIXELS)

    @property
    def num_chunks(self) -> int:
        """Chunks of an image."""
        return triton.cdiv(self.pixels, self.chunk)

    @property
    def tile_options(self) -> dict[str, int]:
        """Options of the split launches over pixels. 64 divides every channel count of SD but the VAE's 32."""
        return _tile(self.pixels, min(triton.next_power_of_2(self.channels), 64), TILE // 2)

    @property
    def merge_options(self) -> dict[str, int]:
        """Options of the launches that merge chunks: one group a program."""
        block_c = min(triton.next_power_of_2(self.size), 64)
        block_p = max(1, min(triton.next_power_of_2(self.num_chunks), 2048 // block_c))
        return {"SIZE": self.size, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4, "maxnreg": 128}

    def grid(self, num_rows: int, block_c: int) -> tuple[int]:
        """Grid of the split launches: `num_rows` parts of the pixels by tiles of `block_c` channels."""
        return (self.images * num_rows * triton.cdiv(self.channels, block_c),)
