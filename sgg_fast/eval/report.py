"""The output of an evaluation: JSON with every value, tables, a sheet with the graphs beside their pictures."""

from __future__ import annotations

import hashlib
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


RESULT = "eval.json"


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write RESULT in `folder`, with a SHA-256 of its content."""
    plain = _plain(result)
    write_json(folder / RESULT, {**plain, "sha256": _digest(plain)})


def read_result(folder: Path) -> dict[str, Any]:
    """The content of RESULT in `folder`. Raises ValueError if a byte was changed, or if it is no evaluation's.

    Results of older versions have no SHA-256.
    """
    path, cure = folder / RESULT, "evaluate that model again"
    try:
        result = json.loads(path.read_text(encoding="utf-8-sig"))
        known = result.pop("sha256", None)
        for key in ("counterfactual pairs", "per picture"):
            result[key].items()
        result["data"]  # KeyError
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}; {cure}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is not the result of an evaluation ({error!r}); {cure}") from error
    if known not in (None, _digest(result)):
        raise ValueError(f"{path}: its bytes are not those that were written (SHA-256 differs); {cure}")
    return result


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


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
