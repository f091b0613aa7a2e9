"""The shapes of the toy world's categories, and how to paint one of them.

Shapes are data, so a category is a few lines in this file. Not here: where objects stand and how they relate
(`sgg_fast/toy/world.py`).

A sprite lives in its own unit box, x to the right, y down, facing right. A stroke is (kind, tint, coordinates, line
width in sprite widths); a later stroke covers an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SUPERSAMPLING = 4

RGB = tuple[int, int, int]
Stroke = tuple[str, str, tuple[float, ...], float]
Frame = tuple[float, float, float, float]

PALETTE: dict[str, RGB] = {
    "red": (222, 48, 44),
    "blue": (44, 92, 214),
    "yellow": (250, 216, 48),
    "green": (40, 148, 62),
    "orange": (246, 138, 34),
    "purple": (146, 66, 178),
    "white": (246, 246, 244),
    "black": (52, 50, 58),
    "brown": (146, 92, 50),
}
FIXED: dict[str, RGB] = {
    "ink": (36, 32, 40),
    "wood": (116, 76, 44),
    "slate": (92, 74, 80),
    "glass": (176, 222, 244),
    "cream": (250, 246, 228),
    "beak": (244, 164, 40),
    "grey": (170, 170, 176),
    "glow": (255, 244, 150),
}
SURFACES: dict[str, tuple[RGB, RGB, float]] = {
    "grass": ((132, 200, 84), (100, 170, 62), 0.015),
    "sea": ((46, 140, 186), (96, 180, 214), 0.0),
    "sand": ((240, 214, 150), (214, 184, 120), 0.012),
}
"""Colour, colour of the texture, and swell of the upper rim in picture units."""
SKINS: tuple[RGB, ...] = ((250, 212, 176), (226, 172, 128), (168, 112, 76), (112, 74, 52))
HAIRS: tuple[RGB, ...] = ((60, 40, 30), (128, 76, 36), (226, 184, 92))
TROUSERS: tuple[RGB, ...] = ((48, 58, 104), (86, 70, 62), (64, 64, 70))


def _filled(kind: str) -> Callable[..., Stroke]:
    return lambda tint, *coordinates: (kind, tint, coordinates, 0.0)


_oval, _rect, _dome, _poly = map(_filled, ("oval", "rect", "dome", "poly"))


def _line(tint: str, width: float, *points: float) -> Stroke:
    return ("line", tint, points, width)


def _rays(count: int, inner: float, outer: float) -> tuple[Stroke, ...]:
    """Triangular sun rays around the middle of the unit box."""
    rays = []
    for k in range(count):
        angle, half = 2 * math.pi * k / count, 0.6 * math.pi / count
        tip = (0.5 + outer * math.cos(angle), 0.5 + outer * math.sin(angle))
        left = (0.5 + inner * math.cos(angle - half), 0.5 + inner * math.sin(angle - half))
        right = (0.5 + inner * math.cos(angle + half), 0.5 + inner * math.sin(angle + half))
        rays.append(_poly("main", *left, *tip, *right))
    return tuple(rays)


_HEAD = (
    _oval("skin", 0.2, 0.0, 0.82, 0.33),
    _dome("hair", 0.18, -0.02, 0.84, 0.25),
    _oval("ink", 0.4, 0.15, 0.49, 0.2),
    _oval("ink", 0.62, 0.15, 0.71, 0.2),
)
_TRUNK = (
    _rect("legs", 0.28, 0.66, 0.48, 1.0),
    _rect("legs", 0.54, 0.66, 0.74, 1.0),
    _rect("main", 0.24, 0.36, 0.78, 0.74),
)

SHAPES: dict[str, tuple[Stroke, ...]] = {
    "person": (
        _line("skin", 0.14, 0.27, 0.42, 0.07, 0.68),
        _line("skin", 0.14, 0.75, 0.42, 0.95, 0.68),
        *_TRUNK,
        *_HEAD,
    ),
    "person holding": (
        _line("skin", 0.14, 0.27, 0.42, 0.07, 0.68),
        *_TRUNK,
        _line("skin", 0.15, 0.68, 0.46, 1.0, 0.42),
        *_HEAD,
    ),
    "person riding": (
        _poly("main", 0.24, 0.42, 0.74, 0.42, 0.7, 0.84, 0.24, 0.84),
        _line("legs", 0.24, 0.42, 0.76, 0.64, 0.84, 0.56, 1.0),
        _oval("skin", 0.18, 0.0, 0.74, 0.4),
        _dome("hair", 0.16, -0.02, 0.76, 0.3),
        _oval("ink", 0.38, 0.18, 0.46, 0.24),
        _oval("ink", 0.58, 0.18, 0.66, 0.24),
        _line("skin", 0.13, 0.52, 0.54, 0.96, 0.66),
    ),
    "hat": (
        _oval("main", 0.0, 0.66, 1.0, 1.0),
        _rect("main", 0.22, 0.25, 0.78, 0.84),
        _dome("main", 0.22, 0.0, 0.78, 0.5),
        _rect("dark", 0.22, 0.56, 0.78, 0.76),
    ),
    "horse": (
        _line("dark", 0.09, 0.15, 0.44, 0.05, 0.5, 0.04, 0.76),
        _rect("dark", 0.28, 0.62, 0.36, 1.0),
        _rect("dark", 0.56, 0.62, 0.64, 1.0),
        _rect("main", 0.16, 0.56, 0.25, 1.0),
        _rect("main", 0.65, 0.56, 0.74, 1.0),
        _oval("main", 0.1, 0.38, 0.78, 0.74),
        _poly("main", 0.52, 0.48, 0.68, 0.08, 0.84, 0.18, 0.77, 0.6),
        _poly("main", 0.68, 0.08, 0.8, 0.06, 1.0, 0.26, 0.95, 0.36, 0.76, 0.27),
        _poly("main", 0.7, 0.09, 0.73, -0.03, 0.79, 0.08),
        _line("dark", 0.07, 0.52, 0.42, 0.69, 0.06),
        _oval("ink", 0.8, 0.13, 0.85, 0.19),
    ),
    "sheep": (
        _rect("ink", 0.2, 0.68, 0.29, 1.0),
        _rect("ink", 0.54, 0.68, 0.63, 1.0),
        _oval("main", 0.0, 0.26, 0.34, 0.68),
        _oval("main", 0.1, 0.1, 0.45, 0.52),
        _oval("main", 0.34, 0.08, 0.68, 0.5),
        _oval("main", 0.48, 0.26, 0.8, 0.72),
        _oval("main", 0.1, 0.42, 0.45, 0.82),
        _oval("main", 0.32, 0.42, 0.66, 0.82),
        _rect("main", 0.18, 0.25, 0.66, 0.66),
        _oval("face", 0.66, 0.14, 0.98, 0.62),
        _oval("face", 0.58, 0.2, 0.74, 0.34),
        _oval("cream", 0.82, 0.26, 0.9, 0.36),
    ),
    "dog": (
        _line("main", 0.1, 0.2, 0.52, 0.04, 0.2),
        _rect("dark", 0.28, 0.66, 0.37, 1.0),
        _rect("dark", 0.54, 0.66, 0.63, 1.0),
        _rect("main", 0.16, 0.62, 0.26, 1.0),
        _rect("main", 0.62, 0.62, 0.72, 1.0),
        _oval("main", 0.12, 0.44, 0.52, 0.82),
        _rect("main", 0.28, 0.46, 0.73, 0.78),
        _oval("main", 0.54, 0.06, 0.9, 0.56),
        _oval("main", 0.72, 0.26, 1.0, 0.52),
        _oval("ink", 0.92, 0.26, 1.01, 0.38),
        _oval("dark", 0.5, 0.08, 0.66, 0.54),
        _oval("ink", 0.74, 0.18, 0.81, 0.28),
    ),
    "bird": (
        _line("beak", 0.06, 0.44, 0.75, 0.44, 1.0),
        _line("beak", 0.06, 0.58, 0.75, 0.58, 1.0),
        _poly("main", 0.24, 0.5, 0.0, 0.3, 0.02, 0.62, 0.3, 0.72),
        _oval("main", 0.16, 0.32, 0.74, 0.86),
        _poly("beak", 0.82, 0.18, 1.0, 0.3, 0.82, 0.42),
        _oval("main", 0.52, 0.04, 0.88, 0.5),
        _oval("dark", 0.22, 0.42, 0.54, 0.72),
        _oval("ink", 0.68, 0.15, 0.77, 0.27),
    ),
    "house": (
        _rect("slate", 0.7, 0.06, 0.8, 0.3),
        _rect("main", 0.1, 0.42, 0.9, 1.0),
        _poly("slate", 0.0, 0.46, 0.5, 0.0, 1.0, 0.46),
        _rect("wood", 0.42, 0.64, 0.6, 1.0),
        _rect("glass", 0.18, 0.56, 0.34, 0.74),
        _rect("glass", 0.67, 0.56, 0.83, 0.74),
    ),
    "tree": (
        _rect("wood", 0.4, 0.58, 0.6, 1.0),
        _oval("main", 0.0, 0.24, 0.6, 0.7),
        _oval("main", 0.4, 0.24, 1.0, 0.7),
        _oval("main", 0.16, 0.0, 0.84, 0.52),
        _oval("main", 0.25, 0.3, 0.75, 0.72),
        _oval("light", 0.28, 0.08, 0.54, 0.26),
        _oval("light", 0.12, 0.34, 0.32, 0.48),
    ),
    "car": (
        _poly("main", 0.16, 0.46, 0.28, 0.0, 0.7, 0.0, 0.84, 0.46),
        _poly("main", 0.0, 0.48, 0.06, 0.4, 0.92, 0.4, 1.0, 0.52, 1.0, 0.84, 0.0, 0.84),
        _poly("glass", 0.25, 0.4, 0.32, 0.1, 0.46, 0.1, 0.46, 0.4),
        _poly("glass", 0.53, 0.4, 0.53, 0.1, 0.67, 0.1, 0.76, 0.4),
        _oval("glow", 0.92, 0.5, 1.0, 0.64),
        _oval("ink", 0.12, 0.58, 0.33, 1.0),
        _oval("ink", 0.67, 0.58, 0.88, 1.0),
        _oval("grey", 0.18, 0.7, 0.27, 0.88),
        _oval("grey", 0.73, 0.7, 0.82, 0.88),
    ),
    "boat": (
        _line("wood", 0.05, 0.56, 0.74, 0.56, 0.0),
        _poly("cream", 0.61, 0.04, 0.99, 0.62, 0.61, 0.62),
        _poly("main", 0.0, 0.7, 1.0, 0.7, 0.84, 1.0, 0.16, 1.0),
        _poly("dark", 0.0, 0.7, 1.0, 0.7, 0.96, 0.78, 0.04, 0.78),
    ),
    "kite": (
        ("thread", "ink", (0.6, 0.6, 0.0, 1.0), 0.055),
        _poly("main", 0.78, 0.0, 1.0, 0.34, 0.58, 0.64, 0.38, 0.2),
        _poly("light", 0.78, 0.0, 1.0, 0.34, 0.69, 0.28),
        _poly("dark", 0.69, 0.28, 0.58, 0.64, 0.38, 0.2),
    ),
    "ball": (
        _oval("main", 0.0, 0.0, 1.0, 1.0),
        _oval("light", 0.3, 0.02, 0.7, 0.98),
    ),
    "umbrella": (
        _line("wood", 0.07, 0.5, 0.1, 0.5, 1.0),
        _dome("main", 0.0, 0.02, 1.0, 0.84),
        _dome("light", 0.3, 0.02, 0.7, 0.84),
        _line("main", 0.06, 0.5, 0.0, 0.5, 0.08),
    ),
    "sun": (*_rays(10, 0.36, 0.52), _oval("main", 0.16, 0.16, 0.84, 0.84)),
    "cloud": (
        _oval("main", 0.0, 0.4, 0.4, 1.0),
        _oval("main", 0.16, 0.08, 0.6, 0.9),
        _oval("main", 0.46, 0.0, 0.82, 0.8),
        _oval("main", 0.62, 0.36, 1.0, 1.0),
        _rect("main", 0.2, 0.5, 0.8, 1.0),
    ),
}


def shade(rgb: RGB, factor: float) -> RGB:
    """Darker below 1; above 1 towards white by the excess."""
    if factor <= 1.0:
        return tuple(int(c * factor) for c in rgb)  # type: ignore[return-value]
    return tuple(int(c + (255 - c) * (factor - 1.0)) for c in rgb)  # type: ignore[return-value]


def tints(main: RGB, rng: np.random.Generator) -> dict[str, RGB]:
    """Every tint a stroke can name, for one object whose own colour is `main`."""
    bright = min(main) > 200
    return {
        **FIXED,
        "main": main,
        "dark": shade(main, 0.72),
        "light": (214, 60, 60) if bright else shade(main, 1.6),
        "face": FIXED["ink"] if bright else FIXED["grey"],
        "edge": shade(main, 0.5),
        "skin": SKINS[rng.integers(len(SKINS))],
        "hair": HAIRS[rng.integers(len(HAIRS))],
        "legs": TROUSERS[rng.integers(len(TROUSERS))],
    }


def _stroke(draw: ImageDraw.ImageDraw, kind: str, p: list[float], width: float, fill: RGB, grow: float) -> None:
    """Draws one stroke whose points `p` (x, y, x, y, ...) are in pixels, `grow` pixels larger all round."""
    if kind in ("line", "thread"):
        draw.line(p, fill=fill, width=max(1, round(width + 2 * grow)), joint="curve")
        return
    if kind == "poly":
        draw.polygon(p, fill=fill)
        if grow:
            draw.line([*p, *p[:4]], fill=fill, width=round(2 * grow), joint="curve")
        return
    left, right = sorted((p[0], p[2]))
    box = (left - grow, p[1] - grow, right + grow, p[3] + grow)
    if kind == "oval":
        draw.ellipse(box, fill=fill)
    elif kind == "rect":
        draw.rectangle(box, fill=fill)
    else:
        draw.chord(box, 180, 360, fill=fill)


def paint(sprite: str, frame: Frame, flip: bool, colours: dict[str, RGB], size: int) -> tuple[Image.Image, int, int]:
    """One sprite, outlined, at `SUPERSAMPLING` times the picture's resolution.

    `frame` is (x, y, width, height) in picture units. Returns the RGBA patch and the picture pixel (column,
    row) of its corner; the patch covers whole picture pixels.
    """
    x, y, w, h = (v * size for v in frame)
    grow = size / 32
    pad = 1 + grow / SUPERSAMPLING
    col, row = math.floor(x - pad), math.floor(y - pad)
    extent = (math.ceil(x + w + pad) - col, math.ceil(y + h + pad) - row)
    patch = Image.new("RGBA", (extent[0] * SUPERSAMPLING, extent[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(patch)
    x_scale = (-w if flip else w) * SUPERSAMPLING
    x_zero = (x + (w if flip else 0.0) - col) * SUPERSAMPLING
    y_scale, y_zero = h * SUPERSAMPLING, (y - row) * SUPERSAMPLING
    strokes = []
    for kind, tint, points, width in SHAPES[sprite]:
        pixels = [x_zero + v * x_scale if k % 2 == 0 else y_zero + v * y_scale for k, v in enumerate(points)]
        strokes.append((kind, pixels, width * w * SUPERSAMPLING, colours[tint]))
    for kind, pixels, width, _ in strokes:
        # A thread as wide as its outline would look like a rod.
        if kind != "thread":
            _stroke(draw, kind, pixels, width, colours["edge"], grow)
    for kind, pixels, width, fill in strokes:
        _stroke(draw, kind, pixels, width, fill, 0.0)
    return patch, col, row


def snow_cap(patch: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Snow on the object of `patch` (RGBA): a wavy layer under the upper contour of each column."""
    solid_HW = np.asarray(patch.getchannel("A")) > 127
    height, width = solid_HW.shape
    top_W = solid_HW.argmax(axis=0)
    wave_W = np.sin(np.arange(width) * 24.0 / width + rng.uniform(0, 6.3))
    depth_W = height * (0.19 + 0.05 * wave_W)
    row_H1 = np.arange(height)[:, None]
    snow_HW = (row_H1 >= top_W - 3) & (row_H1 < top_W + depth_W) & solid_HW.any(axis=0)
    out_HWC = np.zeros((height, width, 4), np.uint8)
    out_HWC[snow_HW] = (250, 252, 255, 255)
    out_HWC[snow_HW & (row_H1 >= top_W + depth_W - 4)] = (196, 212, 236, 255)
    return Image.fromarray(out_HWC, "RGBA")


def scatter(
    patch: Image.Image, colours: tuple[RGB, ...], dot: float, count: int, rng: np.random.Generator
) -> Image.Image:
    """`count` dots of `dot` pixels radius on the solid part of `patch` (RGBA), none of them beyond it."""
    rows, cols = np.nonzero(np.asarray(patch.getchannel("A")) > 127)
    out = Image.new("RGBA", patch.size)
    draw = ImageDraw.Draw(out)
    for k in rng.integers(len(rows), size=count):
        x, y, fill = int(cols[k]), int(rows[k]), colours[rng.integers(len(colours))]
        draw.ellipse((x - dot - 1, y - dot, x + dot + 1, y + dot), fill=shade(fill, 0.6))
        draw.ellipse((x - dot, y - dot + 1, x + dot, y + dot - 1), fill=fill)
    out.putalpha(ImageChops.darker(out.getchannel("A"), patch.getchannel("A")))
    return out


def surface(kind: str, top: float, size: int, rng: np.random.Generator) -> Image.Image:
    """Grass, sea or sand from `top` (picture units) to the lower edge: RGBA at full supersampled size."""
    side = size * SUPERSAMPLING
    base, mark, swell = SURFACES[kind]
    fill = shade(base, rng.uniform(0.94, 1.0))
    patch = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(patch)
    phase, waves = rng.uniform(0, 6.3), rng.uniform(5, 9)
    rim = [(x, side * (top + swell * math.sin(phase + waves * x / side))) for x in range(0, side + 8, 8)]
    draw.polygon([*rim, (side, side), (0, side)], fill=fill)
    reach = side / 24
    for u, v in rng.random((14, 2)):
        x, y = u * side, side * (top + 0.05 + v * (0.95 - top))
        if kind == "grass":
            draw.line((x - 4, y - 7, x, y, x + 4, y - 7), fill=mark, width=3)
        elif kind == "sea":
            draw.line((x - reach, y, x, y - 4, x + reach, y), fill=mark, width=4)
        else:
            draw.ellipse((x - 3, y - 2, x + 3, y + 2), fill=mark)
    return patch


def cover(kind: str, patch: Image.Image, ground: bool, rng: np.random.Generator) -> Image.Image:
    """Snow, leaves or flowers over the object or ground of `patch` (RGBA); the result has the same size."""
    unit = SUPERSAMPLING * 1.2
    if kind == "snow":
        return scatter(patch, ((250, 252, 255),), 4 * unit, 40, rng) if ground else snow_cap(patch, rng)
    if kind == "leaves":
        fills = ((226, 92, 30), (240, 176, 40), (176, 52, 36))
        return scatter(patch, fills, 1.1 * unit, 90 if ground else 26, rng)
    return scatter(patch, (PALETTE["red"], (255, 240, 120), (236, 130, 200)), 1.1 * unit, 80, rng)
