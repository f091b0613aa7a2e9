"""The cut of an image into programs: every channel and pixel once, within what a GPU has."""

from __future__ import annotations

import math

import pytest
import torch
from sgg_kernels import group_norm_layout
from sgg_kernels.group_norm_layout import NormLayout, groups_of_program

LAYOUTS = [
    *(NormLayout(2, pixels, 32 * size, size) for pixels in (1, 64, 1000, 4096) for size in (10, 20, 30, 40, 60, 80)),
    *(NormLayout(1, pixels, channels, channels // 32) for pixels in (4096, 2**18) for channels in (32, 128, 512)),
    NormLayout(3, 9, 21, 7), NormLayout(2, 10**6, 129, 129), NormLayout(0, 16, 40, 10),
]  # fmt: skip
"""The UNet's, the VAE's up to 512 x 512, and odd ones."""


def assert_fits(rows: int, columns: int, num_warps: int) -> None:
    """Powers of two, as `tl.arange` asks, and at most 16 elements a thread."""
    for size in (rows, columns, num_warps):
        assert size > 0 and size & (size - 1) == 0
    assert rows * columns <= 16 * 32 * num_warps


def test_the_split_begins_above_1024_pixels():
    """Where a whole group fits in a program; a group of more than 128 channels never does."""
    layout = group_norm_layout.NormLayout
    assert [layout(2, pixels, 320, 10).whole for pixels in (1024, 1025)] == [40, 0]
    assert [layout(2, 16, 32 * size, size).whole for size in (10, 20, 30, 40, 60, 80)] == [40, 40, 120, 40, 120, 80]
    assert [layout(2, 16, 4 * size, size).whole for size in (128, 129)] == [128, 0]


def test_a_program_takes_the_fewest_groups_of_aligned_rows():
    """The fewest with 32 channels and a multiple of 8, else as many as fit in 128 channels, else none."""
    for num_groups in range(1, 41):
        for size in range(1, 140):
            found = groups_of_program(num_groups, size)
            assert found == 0 or (num_groups % found == 0 and found * size <= 128)
            if found and (found * size < 32 or found * size % 8):
                others = range(found + 1, num_groups + 1)
                assert not any(num_groups % k == 0 and k * size <= 128 for k in others), "no more would fit"
            elif found:
                fewer = [k for k in range(1, found) if num_groups % k == 0 and k * size >= 32]
                assert all(k * size % 8 for k in fewer)
            else:
                assert size > 128


def test_the_layout_of_a_tensor():
    assert NormLayout.of(torch.empty(2, 15, 40), 4) == NormLayout(images=2, pixels=15, channels=40, size=10)


@pytest.mark.parametrize("z", LAYOUTS, ids=str)
def test_the_single_launch_has_every_channel_once(z):
    if z.pixels > 1024 or z.size > 128:
        assert z.whole == 0
        return
    options = z.whole_options
    assert z.whole % z.size == 0 and z.channels % z.whole == 0, "whole groups"
    assert z.whole_grid == (z.images * z.channels // z.whole,)
    assert z.whole <= options["BLOCK_C"] and (options["CHANNELS"], options["SIZE"]) == (z.whole, z.size)
    assert_fits(options["BLOCK_S"], options["BLOCK_C"], options["num_warps"])
    staged = z.staged(3)
    assert staged["STAGES"] == 3 or options["num_warps"] == 16 or z.pixels <= options["BLOCK_S"]
    assert 32 * options["num_warps"] * staged["maxnreg"] <= 2**16, "the registers of an SM"


@pytest.mark.parametrize("z", LAYOUTS, ids=str)
def test_the_split_launches_have_every_pixel_and_channel_once(z):
    assert z.chunk * (z.num_chunks - 1) < z.pixels <= z.chunk * z.num_chunks
    assert z.num_chunks <= 512 and (z.num_chunks == 1 or z.chunk >= 128)
    tile, merge = z.tile_options, z.merge_options
    assert_fits(tile["BLOCK_S"], tile["BLOCK_C"], tile["num_warps"])
    assert_fits(merge["BLOCK_P"], merge["BLOCK_C"], merge["num_warps"])
    assert merge["SIZE"] == z.size and 32 * merge["num_warps"] * merge["maxnreg"] <= 2**16
    tiles_of_channels = math.ceil(z.channels / tile["BLOCK_C"])
    assert z.grid(z.num_chunks, tile["BLOCK_C"]) == (z.images * z.num_chunks * tiles_of_channels,)
