"""What a command's INPUT words stand for: files of graphs, pictures drawn here, standard input, words."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgg_fast.data import layouts
from sgg_fast.data.formats import read_scene_graphs
from sgg_fast.data.png_record import SHIPPED_NAME, SIGNATURE, read_record
from sgg_fast.data.text_form import parse_text
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

_FILE = re.compile(r"\.(json|jsonl|ndjson|png|txt)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Item:
    """One graph to draw."""

    graph: SceneGraph
    stem: str
    """Of the picture's file name, from where the graph was found."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How it was drawn before, where it comes out of a picture."""
    typed: bool = False
    """Whether it was given in words, so that the reading of them should be shown."""


def read_inputs(words: Sequence[str], quiet: bool = False) -> list[Item]:
    """Every graph of every input, in order, `quiet` about what was left out of them.

    Raises `SceneGraphError` for the first that cannot be used.
    """
    before = layouts.logger.disabled
    layouts.logger.disabled = quiet
    try:
        return [item for word in words for item in _read(word)]
    finally:
        layouts.logger.disabled = before


def model_of(items: Sequence[Item]) -> str | None:
    """The model that the pictures among the inputs were drawn with; None without any.

    Raises `SceneGraphError` where they were drawn with several, or with one that is not on this machine: what a
    picture says is no reason to download anything.
    """
    models = sorted({item.settings["model"] for item in items if item.settings})
    if len(models) > 1:
        raise SceneGraphError(
            f"the pictures were drawn with several models ({', '.join(map(shown, models[:3]))}): give --model"
        )
    if models and models[0] != SHIPPED_NAME and not os.path.exists(models[0]):
        raise SceneGraphError(f"the picture was drawn with {shown(models[0])}, which is not here: give --model")
    return models[0] if models else None


def _read(word: str) -> list[Item]:
    if word == "-":
        data = sys.stdin.buffer.read()
        return [Item(graph, "stdin") for graph in read_scene_graphs(data, "standard input", as_text=True)]
    if not _is_file(word):
        return [Item(parse_text(word, "INPUT"), _slug(word), typed=True)]
    try:
        data = Path(word).read_bytes()
    except OSError as error:
        raise SceneGraphError(f"{word}: cannot be read: {error.strerror or error}") from error
    return read_content(data, word)


def read_content(data: bytes, name: str) -> list[Item]:
    """Every graph of a file called `name`: a picture drawn here, or graphs in any form. Raises `SceneGraphError`."""
    path = Path(name)
    if data.startswith(SIGNATURE):
        graph, settings = read_record(io.BytesIO(data), str(path))
        # Not the picture's own name: it would be overwritten.
        return [Item(graph, f"{path.stem}-again", settings)]
    graphs = read_scene_graphs(data, str(path), as_text=path.suffix.lower() == ".txt")
    return [Item(graph, path.stem) for graph in graphs]


def _is_file(word: str) -> bool:
    """Whether a word is meant as a file: one that is there, or one that looks like a path."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SceneGraphError("INPUT: not UTF-8 text") from error
    return os.path.exists(word) or bool(_FILE.search(word)) or (os.sep in word and " " not in word)


def _slug(text: str) -> str:
    words = re.sub(r"[^\w]+", "-", text).strip("-")
    return words[:40].rstrip("-") or "graph"
