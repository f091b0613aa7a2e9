"""The output of an evaluation: JSON with every value, tables, a sheet with the graphs beside their pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sgg_fast.data.png_record import save_png
from sgg_fast.files import write_text
from sgg_fast.graph import SceneGraph
from sgg_fast.pictures.graph_picture import draw_graph
from sgg_fast.pictures.sheets import GAP, INK, PAPER, font

_GRAPH = (330, 240)
_SIDE = 192


def table(rows: Mapping[str, Mapping[str, object]], corner: str = "") -> str:
    """Rows of figures in Markdown, with a column for each figure of any row; "-" for a missing one."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns]]
    lines += [[name, *(_figure(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns) + 1)]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [text[0], rule, *text[1:]])


def _figure(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; NaN and Inf become null."""
    write_text(path, json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else round(float(value), 6)
    return int(value) if isinstance(value, np.integer) else value


def contact_sheet(path: Path, cells: Sequence[tuple[SceneGraph, Mapping[str, np.ndarray]]], columns: int = 2) -> None:
    """Each graph beside its pictures, uint8 [H, W, 3] by caption, in rows of `columns`."""
    most = max(len(pictures) for _, pictures in cells)
    width, height = _GRAPH[0] + GAP + most * (_SIDE + GAP), max(_GRAPH[1], _SIDE + 20)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, (graph, pictures) in enumerate(cells):
        x, y = GAP + n % columns * (width + GAP), GAP + n // columns * (height + GAP)
        drawing = draw_graph(graph, _GRAPH)
        sheet.paste(drawing, (x + (_GRAPH[0] - drawing.width) // 2, y + (height - drawing.height) // 2))
        for k, (caption, picture) in enumerate(pictures.items()):
            left = x + _GRAPH[0] + GAP + k * (_SIDE + GAP)
            sheet.paste(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, y))
            draw.text((left, y + _SIDE + 2), caption, font=font(13), fill=INK)
    save_png(sheet, path, None)
