"""The record in a drawn PNG: graph, seed, settings and model, as JSON in a text chunk."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from sgg_fast.data.formats import parse_json
from sgg_fast.data.layouts import read_document
from sgg_fast.files import write_aside
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

KEYWORD = "sgg_fast"
SHIPPED_NAME = "toy"
"""Name of the packaged model in a record and in --model."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"

_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,), "steps": (int,), "guidance": (int, float), "relation_guidance": (int, float), "size": (int,),
    "scheduler": (str,), "model": (str,), "weights": (str,),
}  # fmt: skip
"""Settings of a record and their types; a record holds the graph and these settings."""
_OLDER: dict[str, Any] = {"relation_guidance": 0.0}
"""Values of later settings in older pictures."""


def graph_json(graph: SceneGraph) -> dict[str, Any]:
    """A graph in sg2im's form."""
    return {"objects": list(graph.objects), "relationships": [list(relation) for relation in graph.relations]}


def encode_png(image: Image.Image, record: dict[str, Any] | None) -> bytes:
    """The bytes of `image` as PNG, with `record` unless None."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    if record is not None:
        info.add_text(KEYWORD, record_text(record))
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def record_text(record: dict[str, Any]) -> str:
    """The JSON text of a record in a picture."""
    return json.dumps(record, sort_keys=True)


def save_png(image: Image.Image, path: Path, record: dict[str, Any] | None) -> None:
    """Write `encode_png` atomically."""
    with write_aside(path) as aside:
        aside.write_bytes(encode_png(image, record))


def raw_record(file: Path | BinaryIO) -> str | None:
    """The record's text in a PNG; None without a record or for a file that is not a readable PNG."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            text = getattr(image, "text", {}).get(KEYWORD)
    except Exception:  # border: Pillow raises anything on a damaged file
        return None
    return text if isinstance(text, str) else None


def is_drawn(path: Path, record: dict[str, Any]) -> bool:
    """True if the file exists with exactly this record; False if its pixels are truncated."""
    return path.is_file() and raw_record(path) == record_text(record)


def read_record(file: Path | BinaryIO, source: str = "") -> tuple[SceneGraph, dict[str, Any]]:
    """(graph, settings) of a picture. Raises `SceneGraphError` for a missing or broken record; it begins with
    `source` (default: the path)."""
    source, text = source or str(file), raw_record(file)
    if text is None:
        raise SceneGraphError(f"{source}: no scene graph in this picture; those that infer.py draws carry one")
    record = parse_json(text, source)
    if not isinstance(record, dict):
        raise SceneGraphError(f"{source}: the record in the picture must be an object, not {shown(record)}")
    (graph,) = read_document(record.get("graph"), source)[:1]
    settings = {}
    for name, kinds in _KINDS.items():
        value = record.get(name, _OLDER.get(name))
        usual = isinstance(value, kinds) and not isinstance(value, bool)
        if not usual or (isinstance(value, float) and not math.isfinite(value)):
            raise SceneGraphError(f"{source}: the record in the picture has no usable {name}: {shown(value)}")
        settings[name] = value
    return graph, settings
