"""What a command's INPUT words stand for: files of graphs, pictures drawn here, standard input, words."""

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
"""Bytes of an input that are looked at first, and at most. Visual Genome's largest file has 0.8 GB."""
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
    """All of a file or stream, read once. Raises `SceneGraphError` where it begins as none of ours, or has no end.

    What has no end (/dev/zero) is known by its first bytes; a stream is not asked for its size, which it does not know.
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
    """Every graph of a file called `name`: a picture drawn here, or graphs in any form.

    Raises `SceneGraphError`, which begins with `source`, the name unless given.
    """
    path = Path(name)
    source, stem = source or str(path), _stem(path)
    if data.startswith(SIGNATURE):
        graph, settings = read_record(io.BytesIO(data), source)
        # Not the picture's own name: it would be overwritten.
        return [Item(graph, f"{stem}-again", settings)]
    # What has no ending (a stream, /dev/fd/63) may hold either.
    graphs = read_scene_graphs(data, source, as_text=path.suffix.lower() in ("", ".txt"))
    return [Item(graph, stem) for graph in graphs]


def _stem(path: Path) -> str:
    """A file's stem, fit for the name of a picture and for a terminal."""
    return "".join(c if c.isprintable() else "-" for c in path.stem) or "graph"


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
