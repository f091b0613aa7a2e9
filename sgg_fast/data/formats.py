"""Scene graphs in files. Native form: sg2im's JSON, one graph or a list.

{"objects": ["sky", "grass", "sheep"], "relationships": [[0, "above", 1], [2, "standing on", 1]]}
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sgg_fast.graph import IMAGE_OBJECT, IN_IMAGE, SceneGraph, SceneGraphError

logger = logging.getLogger(__name__)

_RESERVED = (IMAGE_OBJECT, IN_IMAGE)


def load_scene_graphs(path: str | Path) -> list[SceneGraph]:
    """Every graph of a JSON file, in order. Raises `SceneGraphError` naming file, place and reason."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise SceneGraphError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SceneGraphError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise SceneGraphError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise SceneGraphError(f"{path}: not usable JSON: {error}") from error
    return parse_scene_graphs(document, str(path))


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def parse_scene_graphs(document: Any, source: str = "scene graph") -> list[SceneGraph]:
    """Graphs of a parsed sg2im document, which is not modified. `source` begins every error message."""
    if isinstance(document, list):
        if not document:
            raise SceneGraphError(f"{source}: the list of graphs is empty")
        return [_parse_graph(graph, f"{source}: [{i}]", ".") for i, graph in enumerate(document)]
    return [_parse_graph(document, f"{source}:", " ")]


def _parse_graph(graph: Any, where: str, dot: str) -> SceneGraph:
    if not isinstance(graph, dict):
        raise SceneGraphError(f'{where} a graph must be an object with "objects" and "relationships"')
    names = graph.get("objects")
    if not isinstance(names, list) or not names:
        raise SceneGraphError(f"{where}{dot}objects: must be a non-empty list of names")
    for i, name in enumerate(names):
        _check_name(name, f"{where}{dot}objects[{i}]")
    relations = graph.get("relationships", [])
    if not isinstance(relations, list):
        raise SceneGraphError(f"{where}{dot}relationships: must be a list of [subject, predicate, object]")
    kept: dict[tuple[int, str, int], None] = {}
    for i, relation in enumerate(relations):
        triple = _parse_relation(relation, f"{where}{dot}relationships[{i}]", len(names))
        if triple[0] == triple[2]:
            logger.warning("%s%srelationships[%d]: left out: object %d is related to itself", where, dot, i, triple[0])
        elif triple in kept:
            logger.warning("%s%srelationships[%d]: left out: an exact duplicate", where, dot, i)
        else:
            kept[triple] = None
    return SceneGraph(tuple(name.strip() for name in names), tuple(kept))


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise SceneGraphError(f"{where}: a name must be a non-empty string, not {str(name)[:40]!r}")
    if name.strip() in _RESERVED:
        raise SceneGraphError(f"{where}: {name!r} is added by the model itself; leave it out")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise SceneGraphError(f"{where}: the name holds a lone surrogate, which is not text")


def _parse_relation(relation: Any, where: str, num_objects: int) -> tuple[int, str, int]:
    if not isinstance(relation, list) or len(relation) != 3:
        raise SceneGraphError(f"{where}: must be [subject, predicate, object]")
    subject, predicate, obj = relation
    for index in (subject, obj):
        if type(index) is not int:
            raise SceneGraphError(f"{where}: an object index must be an integer, not {str(index)[:40]!r}")
        if not 0 <= index < num_objects:
            raise SceneGraphError(f"{where}: object index {index}, but the graph has {num_objects} objects")
    _check_name(predicate, where)
    return subject, predicate.strip(), obj
