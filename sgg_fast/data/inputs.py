"""Reads a command's INPUT arguments: files of graphs, pictures with a record, standard input, one-line graphs."""

from __future__ import annotations

import codecs
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sgg_fast.data import layouts
from sgg_fast.data.formats import read_scene_graphs
from sgg_fast.data.png_record import SHIPPED_NAME, SIGNATURE, read_record
from sgg_fast.data.text_form import parse_text
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

_HEAD, MAX_BYTES = 1 << 20, 1 << 30
"""Bytes of an input that are read first, and most bytes. Visual Genome's largest file has 0.8 GB."""
_FILE = re.compile(r"\.(json|jsonl|ndjson|png|txt)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Item:
    """One graph to draw."""

    graph: SceneGraph
    stem: str
    """Stem of the picture's file name, from the name of the input."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the earlier drawing, if the graph comes from a picture."""
    typed: bool = False
    """True for a one-line graph, so that the command shows its reading."""


def read_inputs(words: Sequence[str], quiet: bool = False) -> list[Item]:
    """All graphs of all inputs, in order. `quiet` hides warnings about skipped parts.

    Raises `SceneGraphError` for the first input that cannot be used.
    """
    before = layouts.logger.disabled
    layouts.logger.disabled = quiet
    try:
        return [item for word in words for item in _read(word)]
    finally:
        layouts.logger.disabled = before


def model_of(items: Sequence[Item]) -> str | None:
    """The model of the pictures among the inputs; None without pictures.

    Raises `SceneGraphError` if they were drawn with several models, or with a model that is not on this machine: a
    picture must not cause a download.
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
        if sys.stdin is None:
            raise SceneGraphError("standard input: is closed")
        return read_content(_whole(sys.stdin.buffer, "standard input"), "stdin", "standard input")
    if not _is_file(word):
        return [Item(parse_text(word, "INPUT"), _slug(word), typed=True)]
    try:
        with open(word, "rb") as file:
            return read_content(_whole(file, word), word)
    except OSError as error:
        raise SceneGraphError(f"{word}: cannot be read: {error.strerror or error}") from error


def _whole(file: BinaryIO, source: str) -> bytes:
    """The content of a file or stream, read once. Raises `SceneGraphError` for an unknown type or endless content.

    The first bytes reveal an endless input (/dev/zero); a stream has no known size.
    """
    head = file.read(_HEAD)
    if not head.startswith(SIGNATURE):
        try:
            codecs.getincrementaldecoder("utf-8-sig")().decode(head)
        except UnicodeDecodeError as error:
            raise SceneGraphError(f"{source}: not UTF-8 text (byte {error.start})") from error
        if b"\0" in head:
            raise SceneGraphError(f"{source}: not text (byte {head.index(0)} is zero)")
    rest = file.read(MAX_BYTES) if len(head) == _HEAD else b""
    if len(rest) == MAX_BYTES:
        raise SceneGraphError(f"{source}: over {MAX_BYTES >> 20} MiB: give the graphs in several files")
    return head + rest


def read_content(data: bytes, name: str, source: str = "") -> list[Item]:
    """All graphs of a file called `name`: a picture with a record, or graphs in any form.

    Raises `SceneGraphError`, which begins with `source` (default: `name`).
    """
    path = Path(name)
    source, stem = source or str(path), "".join(c if c.isprintable() else "-" for c in path.stem) or "graph"
    if data.startswith(SIGNATURE):
        graph, settings = read_record(io.BytesIO(data), source)
        # Not the name of the input picture, which would be overwritten.
        return [Item(graph, f"{stem}-again", settings)]
    # An input without an ending (a stream, /dev/fd/63) may hold JSON or text.
    graphs = read_scene_graphs(data, source, as_text=path.suffix.lower() in ("", ".txt"))
    return [Item(graph, stem) for graph in graphs]


def _is_file(word: str) -> bool:
    """True if an argument is an existing file or looks like a path."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SceneGraphError("INPUT: not UTF-8 text") from error
    return os.path.exists(word) or bool(_FILE.search(word)) or (os.sep in word and " " not in word)


def _slug(text: str) -> str:
    words = re.sub(r"[^\w]+", "-", text).strip("-")
    return words[:40].rstrip("-") or "graph"
