"""Combines pictures: with captions beneath, side by side, as a grid. Pixels only."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GREY = (28, 32, 38), (255, 255, 255), (120, 126, 134)
GAP = 12
LARGEST = 4096
"""Most pixels of a grid's longer side; larger pictures are scaled down."""


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font, equal on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Width of one line in pixels."""
    return math.ceil(font(size).getlength(text))


def wrapped(text: str, width: int, size: int, most: int = 3) -> list[str]:
    """At most `most` lines of at most `width` pixels, broken between words if possible; cut text ends in dots."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_shortened(line, width, size) for line in lines]


def _shortened(line: str, width: int, size: int) -> str:
    if text_width(line, size) <= width:
        return line
    while line and text_width(f"{line}...", size) > width:
        line = line[:-1]
    return f"{line}..."


def zoomed(image: Image.Image, side: int) -> Image.Image:
    """`image` enlarged by an integer factor to a longer side of at least `side`, so that pixels stay square."""
    return enlarged(image, max(1, -(-side // max(image.size))))


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """`image` with each pixel enlarged to `factor` x `factor` pixels."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def tiles(images: Sequence[Image.Image], captions: Sequence[str], columns: int, size: int = 14) -> Image.Image:
    """Images of one size in rows, each above its caption."""
    width, height = images[0].size
    texts = [wrapped(caption, width, size) for caption in captions]
    line = round(size * 1.3)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [height + 6 + line * max(len(texts[i]) for i in row) for row in rows]
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), PAPER)
    draw, y = ImageDraw.Draw(sheet), GAP
    for row, taken in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = GAP + column * (width + GAP)
            sheet.paste(images[i], (x, y))
            for k, text in enumerate(texts[i]):
                left = x + (width - text_width(text, size)) // 2
                draw.text((left, y + height + 4 + k * line), text, font=font(size), fill=INK)
        y += taken + GAP
    return sheet


def padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` in the middle of a white picture of `size`."""
    page = Image.new("RGB", size, PAPER)
    page.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return page


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two images side by side on one sheet, centred vertically."""
    height = max(left.height, right.height)
    sheet = Image.new("RGB", (left.width + right.width + 3 * GAP, height + 2 * GAP), PAPER)
    sheet.paste(left, (GAP, GAP + (height - left.height) // 2))
    sheet.paste(right, (left.width + 2 * GAP, GAP + (height - right.height) // 2))
    return sheet


def grid(paths: Sequence[Path], columns: int | None = None) -> Image.Image:
    """The pictures of these files in rows, read one at a time; scaled down if the sheet would be too large."""
    columns = columns or math.ceil(math.sqrt(len(paths)))
    rows = -(-len(paths) // columns)
    with Image.open(paths[0]) as first:
        side = max(first.size)
    side = max(1, min(side, (LARGEST - 2) // max(columns, rows) - 2))
    sheet = Image.new("RGB", (columns * (side + 2) + 2, rows * (side + 2) + 2), PAPER)
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((side, side))
            sheet.paste(small, (2 + i % columns * (side + 2), 2 + i // columns * (side + 2)))
    return sheet
