"""Graphs of the page, from a line of words, a JSON text or a dropped file.

Errors are those of the readers (`SceneGraphError`), unchanged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sgg_fast.data import layouts
from sgg_fast.data.formats import parse_json, parse_scene_graphs
from sgg_fast.data.inputs import Item, read_content
from sgg_fast.data.png_record import graph_json
from sgg_fast.data.text_form import parse_text, to_text
from sgg_fast.graph import SceneGraph, SceneGraphError

MAX_GRAPHS = 200
"""Most graphs of one file that the page offers."""


def text_graph(kind: str, text: str) -> dict[str, Any]:
    """{"graph", "text", "notices"} of the first graph of `text`, which is "text" (one line of words) or "json".

    Raises `SceneGraphError`.
    """
    with noticed() as notices:
        graph = parse_text(text, "text") if kind == "text" else parse_scene_graphs(parse_json(text, "JSON"), "JSON")[0]
    return {**described(graph), "notices": notices[:20]}


def described(graph: SceneGraph) -> dict[str, Any]:
    """A graph for the page: as JSON and as one line of words."""
    return {"graph": graph_json(graph), "text": to_text(graph)}


def file_graphs(data: bytes, name: str) -> dict[str, Any]:
    """{"graphs": [...], "notices": [...]} of a dropped file, a picture drawn here with its "settings".

    Raises `SceneGraphError`. The name only heads the messages; nothing is read from this machine.
    """
    name = name.replace("\\", "/").rpartition("/")[2][:120] or "file"
    with noticed() as notices:
        items = read_content(data, name)
    found = [{**described(item.graph), "settings": dict(item.settings)} for item in items[:MAX_GRAPHS]]
    if len(items) > MAX_GRAPHS:
        notices.append(f"{name}: the first {MAX_GRAPHS} of {len(items)} graphs")
    return {"graphs": found, "notices": notices[:20]}


@contextmanager
def noticed() -> Iterator[list[str]]:
    """Collects the readers' notices in this thread, one line for each part that was left out."""
    lines: list[str] = []
    own = threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == own:
                lines.append(record.getMessage())

    collector = Collector()
    layouts.logger.addHandler(collector)
    try:
        yield lines
    finally:
        layouts.logger.removeHandler(collector)


def item_of(document: Any) -> Item:
    """The graph of a request, {"objects": [...], "relationships": [...]}. Raises `SceneGraphError`."""
    if not isinstance(document, dict):
        raise SceneGraphError('graph: must be an object with "objects" and "relationships"')
    return Item(parse_scene_graphs(document, "graph")[0], "graph")
