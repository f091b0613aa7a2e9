"""Reads scene graphs from files and streams: JSON of any known layout, JSON lines, lines of text.

The native form is sg2im's JSON, one graph or a list. `sgg_fast/data/layouts.py` reads the other layouts.

{"objects": ["sky", "grass", "sheep"], "relationships": [[0, "above", 1], [2, "standing on", 1]]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgg_fast.data.layouts import read_document
from sgg_fast.data.text_form import parse_text
from sgg_fast.graph import SceneGraph, SceneGraphError, shown


def load_scene_graphs(path: str | Path) -> list[SceneGraph]:
    """All graphs of a file, in order. Raises `SceneGraphError` naming file, place and reason."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SceneGraphError(f"{path}: cannot be read: {error.strerror or error}") from error
    return read_scene_graphs(data, str(path), as_text=path.suffix.lower() == ".txt")


def read_scene_graphs(data: bytes, source: str, as_text: bool = False) -> list[SceneGraph]:
    """All graphs of a file's content. `source` begins every error message.

    The content is one JSON document or JSON lines (a document a line). With `as_text`, content that does not begin like
    JSON is read as one-line forms (a graph a line).
    """
    try:
        # Editors on Windows put a byte order mark in front of UTF-8.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SceneGraphError(f"{source}: not UTF-8 text (byte {error.start})") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if as_text and lines and lines[0][1].lstrip()[0] not in "{[":
        return [parse_text(line, f"{source}: line {number}") for number, line in lines]
    if len(lines) > 1 and _is_json(lines[0][1]):
        graphs = []
        for number, line in lines:
            where = f"{source}: line {number}"
            graphs += read_document(parse_json(line, where, within_line=True), where)
        return graphs
    return parse_scene_graphs(parse_json(text, source), source)


def parse_scene_graphs(document: Any, source: str = "scene graph") -> list[SceneGraph]:
    """Graphs of a parsed document of any layout; `document` is not modified. `source` begins every error message."""
    return read_document(document, source)


def _is_json(line: str) -> bool:
    """True if a line is a whole JSON value, so that further lines make the file JSON lines."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def parse_json(text: str, where: str, within_line: bool = False) -> Any:
    """The document of a JSON text without NaN and repeated keys. Raises `SceneGraphError` with the place."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        line = "" if within_line else f"line {error.lineno}, "
        raise SceneGraphError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise SceneGraphError(f"{where}: not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise SceneGraphError(f"{where}: not usable JSON: {error}") from error


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} occurs twice in one object")
        found[key] = value
    return found
