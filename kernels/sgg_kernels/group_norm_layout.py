"""What both directions of `group_norm_silu` share: how an image is cut into programs, and two device functions.

Letters: B images, S pixels of an image, C channels, G groups.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

ONE_PASS_PIXELS = 1024
"""32 x 32, the largest of the UNet's images at 256 x 256. A program's 40 columns of them are 80 KB, 120 are 240."""

ONE_PASS_CHANNELS = 128
"""Columns of one program at the most: groups are found by comparing every two of its channels."""

TILE = 4096
"""Elements of a tile; two accumulators of that size live in the registers of 8 warps."""

CHUNK_PIXELS, MAX_CHUNKS = 128, 512
"""Pixels of a chunk at the least, chunks of an image at the most."""


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


@functools.cache
def groups_of_program(num_groups: int, size: int) -> int:
    """Whole groups that one program of the single launch takes, 0 where not even one fits.

    The fewest (for the most programs) that make 32 channels, so that a row is two sectors at bf16, and a multiple of
    8, so that it starts on 16 bytes; where none do, as many as fit.
    """
    fitting = [k for k in range(1, num_groups + 1) if num_groups % k == 0 and k * size <= ONE_PASS_CHANNELS]
    aligned = [k for k in fitting if k * size >= 32 and k * size % 8 == 0]
    return min(aligned) if aligned else max(fitting, default=0)


def _tile(num_pixels: int, block_c: int, elements: int) -> dict[str, int]:
    """BLOCK_S, BLOCK_C and warps: 16 elements a thread, and no more pixels than there are."""
    block_s = max(1, min(triton.next_power_of_2(max(num_pixels, 1)), elements // block_c))
    return {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": max(1, block_s * block_c // 512)}


@dataclasses.dataclass(frozen=True)
class NormLayout:
    """How an input is cut; a function of its shape alone."""

    images: int
    pixels: int
    channels: int
    size: int
    """C / G."""

    @classmethod
    def of(cls, x_BSC: torch.Tensor, num_groups: int) -> NormLayout:
        """The cut of x in `num_groups` groups."""
        images, pixels, channels = x_BSC.shape
        return cls(images, pixels, channels, channels // num_groups)

    @property
    def whole(self) -> int:
        """Channels of a program where one launch does it all, else 0."""
        if self.pixels > ONE_PASS_PIXELS:
            return 0
        return groups_of_program(self.channels // self.size, self.size) * self.size

    @property
    def whole_grid(self) -> tuple[int]:
        """Of the single launch."""
        return (self.images * (self.channels // self.whole),)

    @property
    def whole_options(self) -> dict[str, int]:
        """Of the single launch. Finding the groups of 128 channels takes as many registers again: twice the warps."""
        blocks = _tile(self.pixels, triton.next_power_of_2(self.whole), TILE)
        if blocks["BLOCK_C"] == ONE_PASS_CHANNELS:
            blocks["num_warps"] *= 2
        return {"CHANNELS": self.whole, "SIZE": self.size, **blocks}

    @property
    def chunk(self) -> int:
        """Pixels of a chunk."""
        return max(CHUNK_PIXELS, triton.cdiv(triton.cdiv(self.pixels, MAX_CHUNKS), CHUNK_PIXELS) * CHUNK_PIXELS)

    @property
    def num_chunks(self) -> int:
        """Of an image."""
        return triton.cdiv(self.pixels, self.chunk)

    @property
    def tile_options(self) -> dict[str, int]:
        """Of the split launches over pixels. 64 channels divide every width of Stable Diffusion but the VAE's 32."""
        return _tile(self.pixels, min(triton.next_power_of_2(self.channels), 64), TILE // 2)

    @property
    def merge_options(self) -> dict[str, int]:
        """Of the launches that merge chunks: one group a program."""
        block_c = min(triton.next_power_of_2(self.size), 64)
        block_p = max(1, min(triton.next_power_of_2(self.num_chunks), 2048 // block_c))
        return {"SIZE": self.size, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4}

    def grid(self, num_rows: int, block_c: int) -> tuple[int]:
        """Of the split launches: `num_rows` cuts of the pixels by the tiles of the channels."""
        return (self.images * num_rows * triton.cdiv(self.channels, block_c),)
