"""The output of an evaluation: JSON with every value, tables, a sheet with the graphs beside their pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgg_fast.data.png_record import save_png
from sgg_fast.files import write_text
from sgg_fast.graph import SceneGraph
from sgg_fast.pictures.graph_picture import draw_graph
from sgg_fast.pictures.sheets import beside, padded, tiles

_GRAPH = (330, 240)
_SIDE = 192


def table(rows: Mapping[str, Mapping[str, float]], corner: str = "") -> str:
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
    rows = []
    for graph, pictures in cells:
        large = [Image.fromarray(p).resize((_SIDE, _SIDE), Image.Resampling.NEAREST) for p in pictures.values()]
        rows.append(beside(padded(draw_graph(graph, _GRAPH), _GRAPH), tiles(large, list(pictures), len(large))))
    width, height = (max(row.size[axis] for row in rows) for axis in (0, 1))
    save_png(tiles([padded(row, (width, height)) for row in rows], [""] * len(rows), columns), path, None)
