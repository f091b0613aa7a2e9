"""What a picture was drawn from, inside its PNG: graph, seed, settings and model, as JSON in a text chunk."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from sgg_fast.data.formats import parse_json
from sgg_fast.data.layouts import read_document
from sgg_fast.files import write_aside
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

KEYWORD = "sgg_fast"
SHIPPED_NAME = "toy"
"""What a record, and --model, call the model that comes with the package."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"

_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,), "steps": (int,), "guidance": (int, float), "relation_guidance": (int, float), "size": (int,),
    "scheduler": (str,), "model": (str,), "weights": (str,),
}  # fmt: skip
"""Settings of a record and their types; a record holds the graph and these."""
_OLDER: dict[str, Any] = {"relation_guidance": 0.0}
"""What those that came later are in pictures from before them."""


def graph_json(graph: SceneGraph) -> dict[str, Any]:
    """A graph in sg2im's form."""
    return {"objects": list(graph.objects), "relationships": [list(relation) for relation in graph.relations]}


def save_png(image: Image.Image, path: Path, record: dict[str, Any] | None) -> None:
    """Write `image`, with its record if it has one; the file appears whole or not at all."""
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_text(KEYWORD, json.dumps(record, sort_keys=True))
    with write_aside(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)


def raw_record(path: Path) -> str | None:
    """The record's text in a PNG, None where there is none or the file is no PNG that can be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = getattr(image, "text", {}).get(KEYWORD)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError,
            Image.DecompressionBombError):  # fmt: skip
        return None
    return text if isinstance(text, str) else None


def is_drawn(path: Path, record: dict[str, Any]) -> bool:
    """Whether the file is there and carries exactly this record."""
    return path.is_file() and raw_record(path) == json.dumps(record, sort_keys=True)


def read_record(path: Path) -> tuple[SceneGraph, dict[str, Any]]:
    """(graph, settings) of a picture. Raises `SceneGraphError` for a picture that carries none, or a broken one."""
    text = raw_record(path)
    if text is None:
        raise SceneGraphError(f"{path}: no scene graph in this picture; those that infer.py draws carry one")
    record = parse_json(text, str(path))
    if not isinstance(record, dict):
        raise SceneGraphError(f"{path}: the record in the picture must be an object, not {shown(record)}")
    (graph,) = read_document(record.get("graph"), str(path))[:1]
    settings = {}
    for name, kinds in _KINDS.items():
        value = record.get(name, _OLDER.get(name))
        usual = isinstance(value, kinds) and not isinstance(value, bool)
        if not usual or (isinstance(value, float) and not math.isfinite(value)):
            raise SceneGraphError(f"{path}: the record in the picture has no usable {name}: {shown(value)}")
        settings[name] = value
    return graph, settings
