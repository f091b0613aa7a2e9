"""Sheets: captions fit, pixels keep their shape, every picture lies where its place is, and grids stay small."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sgg_fast.pictures.sheets import (
    GAP,
    INK,
    PAPER,
    beside,
    enlarged,
    font,
    grid,
    padded,
    text_width,
    tiles,
    wrapped,
    zoomed,
)

RED, BLUE = (200, 0, 0), (0, 0, 200)


def extent(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels of a colour, the last two exclusive as in PIL."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_captions_are_broken_and_shortened_to_fit():
    lines = wrapped("a purple umbrella standing in front of the house " * 4 + "x" * 300, 120, 14)
    assert len(lines) == 3 and all(text_width(line, 14) <= 120 for line in lines) and lines[-1].endswith("...")
    assert zoomed(Image.new("RGB", (64, 32)), 150).size == (192, 96)


def test_a_grid_reads_files_and_stays_small(tmp_path):
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (64, 64), (i, 0, 0)).save(paths[-1])
    sheet = grid(paths, columns=3)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    assert [sheet.getpixel((30 + 66 * (i % 3), 30 + 66 * (i // 3)))[0] for i in range(5)] == list(range(5))
    Image.new("RGB", (1024, 1024)).save(paths[0])
    assert max(grid(paths * 10).size) <= 4096 < 7 * 1024


def test_a_text_is_as_wide_as_it_says():
    """The pixels that PIL writes, up to the bearing of the last letter."""
    ink = font(20).getmask("umbrella").getbbox()
    assert 0 <= text_width("umbrella", 20) - (ink[2] - ink[0]) <= 4
    assert wrapped("umbrella", text_width("umbrella", 20), 20) == ["umbrella"]
    assert wrapped("umbrella", text_width("umbrella", 20) - 1, 20)[0].endswith("...")


def test_an_enlarged_picture_repeats_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3), dtype=np.uint8)
    found = np.asarray(enlarged(Image.fromarray(pixels), 4))
    assert np.array_equal(found, pixels.repeat(4, axis=0).repeat(4, axis=1))


def test_tiles_lie_in_rows_each_above_its_own_caption():
    colours = [(200, 10 * k, 0) for k in range(3)]
    captions = ["short", "a caption of several words that takes lines", "end"]
    sheet = tiles([Image.new("RGB", (60, 40), colour) for colour in colours], captions, columns=2)
    places = [extent(sheet, colour) for colour in colours]
    assert [(r - x, b - y) for x, y, r, b in places] == [(60, 40)] * 3
    first, second, third = places
    assert first[:2] == (GAP, GAP) and second[:2] == (2 * GAP + 60, GAP) and third[0] == GAP
    dark = (np.asarray(sheet).max(axis=-1) < 120) & (np.asarray(sheet)[..., 0] < 120)
    rows = [np.flatnonzero(dark[:, x:r].any(axis=1)) for x, _, r, _ in (first, second)]
    assert third[1] > rows[1][rows[1] < third[1]].max() > second[3] + 25, "the row is as high as its longest caption"
    assert first[3] < rows[0].min() < first[3] + 20 and third[3] < rows[0].max() < sheet.height
    assert not dark[:, first[2] : second[0]].any() and INK < (120, 120, 120)


def test_padding_and_a_pair_centre_what_they_hold():
    small, tall = Image.new("RGB", (10, 6), RED), Image.new("RGB", (8, 20), BLUE)
    page = padded(small, (30, 16))
    assert page.size == (30, 16) and extent(page, RED) == (10, 5, 20, 11) and page.getpixel((0, 0)) == PAPER
    pair = beside(small, tall)
    assert pair.size == (10 + 8 + 3 * GAP, 20 + 2 * GAP)
    assert extent(pair, RED) == (GAP, GAP + 7, GAP + 10, GAP + 13)
    assert extent(pair, BLUE) == (2 * GAP + 10, GAP, 2 * GAP + 18, GAP + 20)
