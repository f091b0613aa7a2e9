"""The shapes of the toy: each lies in its frame, mirrors, and is covered where it is solid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from sgg_fast.toy import sprites
from sgg_fast.toy.sprites import PALETTE, SHAPES, SUPERSAMPLING

SIZE = 64
FRAME = (0.25, 0.25, 0.5, 0.5)
"""On whole pixels, so a mirrored patch covers the same ones."""


def painted(sprite: str, flip: bool = False) -> tuple[Image.Image, int, int]:
    colours = sprites.tints(PALETTE["red"], np.random.default_rng(0))
    return sprites.paint(sprite, FRAME, flip, colours, SIZE)


def solid(patch: Image.Image) -> np.ndarray:
    return np.asarray(patch.getchannel("A")) > 127


def colours_of(patch: Image.Image) -> set[tuple[int, ...]]:
    """RGB of the solid pixels."""
    return set(map(tuple, np.asarray(patch)[solid(patch)][:, :3].tolist()))


@pytest.mark.parametrize("sprite", SHAPES)
def test_a_sprite_fills_its_frame_and_mirrors(sprite):
    """But for its outline and what a line's width adds."""
    patch, column, row = painted(sprite)
    mask = solid(patch)
    rows, columns = np.nonzero(mask)
    found = [(columns.min(), column), (rows.min(), row), (columns.max() + 1, column), (rows.max() + 1, row)]
    x0, y0, x1, y1 = (value / SUPERSAMPLING + corner for value, corner in found)
    for value, side in zip((x0, y0, x1, y1), (16, 16, 48, 48), strict=True):
        assert abs(value - side) <= 5, (sprite, x0, y0, x1, y1)
    turned, *corner = painted(sprite, flip=True)
    assert corner == [column, row] and turned.size == patch.size
    mirrored = solid(turned)[:, ::-1]
    assert (mirrored & mask).sum() > 0.9 * (mirrored | mask).sum()
    assert {tint for _, tint, _, _ in SHAPES[sprite]} <= sprites.tints(PALETTE["red"], np.random.default_rng(0)).keys()


def test_an_oval_has_the_area_of_one_and_an_outline():
    """A ball of 32 x 32 pixels, half a pixel of outline around it."""
    patch, *_ = painted("ball")
    assert solid(patch).sum() / SUPERSAMPLING**2 == pytest.approx(math.pi * 16.5**2, rel=0.03)
    edge = sprites.shade(PALETTE["red"], 0.5)
    is_edge = (np.asarray(patch)[..., :3] == edge).all(axis=-1) & solid(patch)
    assert is_edge.sum() / SUPERSAMPLING**2 == pytest.approx(math.pi * (16.5**2 - 16**2), rel=0.3)


def test_rays_point_away_from_the_middle():
    rays = sprites._rays(4, 0.2, 0.5)
    tips = [stroke[2][2:4] for stroke in rays]
    assert np.allclose(tips, [(1, 0.5), (0.5, 1), (0, 0.5), (0.5, 0)])
    for kind, tint, (ax, ay, _, _, bx, by), width in rays:
        assert (kind, tint, width) == ("poly", "main", 0.0)
        assert math.dist((ax, ay), (0.5, 0.5)) == pytest.approx(0.2) == math.dist((bx, by), (0.5, 0.5))
    assert sprites._line("wood", 0.1, 0, 0, 1, 1) == ("line", "wood", (0, 0, 1, 1), 0.1)
    assert sprites._filled("oval")("main", 0, 0, 1, 1) == ("oval", "main", (0, 0, 1, 1), 0.0)


def test_shades_go_to_black_and_to_white():
    assert [sprites.shade((200, 100, 0), factor) for factor in (0.0, 0.5, 1.0, 1.5, 2.0)] == [
        (0, 0, 0), (100, 50, 0), (200, 100, 0), (227, 177, 127), (255, 255, 255)]  # fmt: skip
    white, red = (sprites.tints(PALETTE[name], np.random.default_rng(0)) for name in ("white", "red"))
    assert max(white["light"]) - min(white["light"]) > 100, "a stripe on white is not white"
    assert sum(white["face"]) < sum(PALETTE["white"]) / 3 < sum(red["face"]), "a face is seen on its wool"


@pytest.mark.parametrize("kind", ["grass", "sea", "sand"])
def test_a_surface_is_solid_below_its_rim(kind):
    patch = sprites.surface(kind, 0.5, SIZE, np.random.default_rng(0))
    mask, side = solid(patch), SIZE * SUPERSAMPLING
    swell = math.ceil(sprites.SURFACES[kind][2] * side) + 2
    assert mask.shape == (side, side)
    assert mask[side // 2 + swell :].all() and not mask[: side // 2 - swell].any()
    fill, mark, _ = sprites.SURFACES[kind]
    assert len(colours_of(patch)) == 2 and mark in colours_of(patch), "the ground and its texture"
    (ground,) = colours_of(patch) - {mark}
    assert all(0.93 * a <= b <= a for a, b in zip(fill, ground, strict=True))


def test_snow_lies_on_top_of_each_column():
    patch, *_ = painted("house")
    snow = sprites.snow_cap(patch, np.random.default_rng(0))
    below, above = solid(patch), solid(snow)
    assert snow.size == patch.size and (above.any(axis=0) == below.any(axis=0)).all()
    columns = np.flatnonzero(below.any(axis=0))
    tops, depth = above.argmax(axis=0) - below.argmax(axis=0), above.sum(axis=0)
    assert (tops[columns] <= 0).all() and (tops[columns] >= -3).all()
    assert (depth[columns] > 0.1 * patch.height).all() and (depth[columns] < 0.27 * patch.height).all()
    assert all(min(colour) > 190 for colour in colours_of(snow)), "white, blue at its rim"


def test_dots_stay_on_what_they_cover():
    patch, *_ = painted("house")
    fills = ((250, 10, 10), (10, 250, 10))
    dots = sprites.scatter(patch, fills, 3.0, 30, np.random.default_rng(0))
    assert not (solid(dots) & ~solid(patch)).any() and solid(dots).any()
    assert colours_of(dots) == {*fills, *(sprites.shade(fill, 0.6) for fill in fills)}
    more = sprites.scatter(patch, fills, 3.0, 300, np.random.default_rng(0))
    assert solid(more).sum() > 2 * solid(dots).sum()


@pytest.mark.parametrize("ground", [False, True])
def test_each_cover_has_its_own_look(ground):
    rng = np.random.default_rng(0)
    patch = sprites.surface("grass", 0.5, SIZE, rng) if ground else painted("house")[0]
    covers = {kind: sprites.cover(kind, patch, ground, rng) for kind in ("snow", "leaves", "flowers")}
    for kind, cover in covers.items():
        assert cover.size == patch.size and 0 < solid(cover).sum() < 0.9 * solid(patch).sum(), kind
    assert min(max(colour) for colour in colours_of(covers["snow"])) >= 150
    assert all(red > blue for red, _, blue in colours_of(covers["leaves"])), "of autumn"
    assert PALETTE["red"] in colours_of(covers["flowers"]) - colours_of(covers["leaves"])
