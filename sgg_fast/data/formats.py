"""Scene graphs in files. Native form: sg2im's JSON, one graph or a list.

{"objects": ["sky", "grass", "sheep"], "relationships": [[0, "above", 1], [2, "standing on", 1]]}
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sgg_fast.graph import SceneGraph, SceneGraphError, check_index, check_name

logger = logging.getLogger(__name__)


def load_scene_graphs(path: str | Path) -> list[SceneGraph]:
    """Every graph of a JSON file, in order. Raises `SceneGraphError` naming file, place and reason."""
    path = Path(path)
    try:
        # Editors on Windows put a byte order mark in front of UTF-8.
        document = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_constant)
    except OSError as error:
        raise SceneGraphError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SceneGraphError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise SceneGraphError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise SceneGraphError(f"{path}: not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise SceneGraphError(f"{path}: not usable JSON: {error}") from error
    return parse_scene_graphs(document, str(path))


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def parse_scene_graphs(document: Any, source: str = "scene graph") -> list[SceneGraph]:
    """Graphs of a parsed sg2im document, which is not modified. `source` begins every error message."""
    if isinstance(document, list):
        if not document:
            raise SceneGraphError(f"{source}: the list of graphs is empty")
        return [_parse_graph(graph, source, f"[{i}]") for i, graph in enumerate(document)]
    return [_parse_graph(document, source, "")]


def _parse_graph(graph: Any, source: str, path: str) -> SceneGraph:
    if not isinstance(graph, dict):
        where = f"{source}: {path}" if path else source
        raise SceneGraphError(f'{where}: a graph must be an object with "objects" and "relationships"')
    where = f"{source}: {path}." if path else f"{source}: "
    names = graph.get("objects")
    if not isinstance(names, list) or not names:
        raise SceneGraphError(f"{where}objects: must be a non-empty list of names")
    for i, name in enumerate(names):
        check_name(name, f"{where}objects[{i}]")
    relations = graph.get("relationships", [])
    if not isinstance(relations, list):
        raise SceneGraphError(f"{where}relationships: must be a list of [subject, predicate, object]")
    kept: dict[tuple[int, str, int], None] = {}
    for i, relation in enumerate(relations):
        triple = _parse_relation(relation, f"{where}relationships[{i}]", len(names))
        if triple[0] == triple[2]:
            logger.warning("%srelationships[%d]: left out: object %d is related to itself", where, i, triple[0])
        elif triple in kept:
            logger.warning("%srelationships[%d]: left out: an exact duplicate", where, i)
        else:
            kept[triple] = None
    return SceneGraph(tuple(name.strip() for name in names), tuple(kept))


def _parse_relation(relation: Any, where: str, num_objects: int) -> tuple[int, str, int]:
    if not isinstance(relation, list) or len(relation) != 3:
        raise SceneGraphError(f"{where}: must be [subject, predicate, object]")
    subject, predicate, obj = relation
    for index in (subject, obj):
        check_index(index, num_objects, where)
    check_name(predicate, where)
    return subject, predicate.strip(), obj
