"""Reads annotation files record by record, and checks single values.

The module of each data set interprets the records.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgg_fast.data.layouts import clean_name
from sgg_fast.graph import SceneGraphError, shown

CHUNK = 1 << 20
"""Characters of one read."""
MAX_RECORD = 1 << 26
"""Longest record in characters; a longer one counts as broken JSON."""
INT32_MAX = 2**31 - 1
_SPACE = re.compile(r"[ \t\n\r]*")


class PrepareError(ValueError):
    """Unusable files or settings; the message is one line and names the cure."""


class FaultError(ValueError):
    """A skipped record or part of a record; the message is the reason."""


class _Window:
    """The part of a file in memory during parsing. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.text, self.at, self.before = "", 0, 0

    def more(self) -> bool:
        """Drop the parsed part and read at least as much as is left; False at the end of the file."""
        left = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(left)))
        self.before += self.at
        self.text, self.at = left + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def error(self, reason: str, at: int | None = None) -> PrepareError:
        where = self.before + (self.at if at is None else at)
        return PrepareError(f"{self.path}: not usable JSON: {reason} at character {where}; download the file again")

    def element(self, decoder: json.JSONDecoder) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                broken = self.error(error.msg.removesuffix(" at"), error.pos)
                # The value may continue beyond the window.
                if len(self.text) - self.at > MAX_RECORD or not self.more():
                    raise broken from error
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:
                raise self.error(str(error)) from error
            else:
                if end < len(self.text) or not self.more():
                    self.at = end
                    return value


def stream(path: Path) -> Iterator[Any]:
    """Elements of a JSON list, one at a time in memory. Raises `PrepareError` with the place for broken JSON."""
    decoder = json.JSONDecoder()
    window = _Window(path)
    with window.file:
        if window.peek() != "[":
            raise window.error("must be a list of records")
        yield from _elements(window, decoder)
        if window.peek():
            raise window.error("more text after the list")


def stream_lists(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, element) of every list in a JSON object, as in COCO's files, one element at a time in memory.

    Values that are not lists are skipped. Raises `PrepareError` with the place for broken JSON.
    """
    decoder = json.JSONDecoder()
    window = _Window(path)
    with window.file:
        if window.peek() != "{":
            raise window.error("must be an object of lists")
        window.at += 1
        more = window.peek() != "}"
        while more:
            key = window.element(decoder) if window.peek() == '"' else None
            if not isinstance(key, str) or window.peek() != ":":
                raise window.error("a key and ':' expected")
            window.at += 1
            if window.peek() == "[":
                for element in _elements(window, decoder):
                    yield key, element
            else:
                window.element(decoder)
            more = _more(window, "}", "object")
        window.at += 1
        if window.peek():
            raise window.error("more text after the object")


def _elements(window: _Window, decoder: json.JSONDecoder) -> Iterator[Any]:
    """Elements of the list at the current position; ends after the list."""
    window.at += 1
    more = window.peek() != "]"
    while more:
        yield window.element(decoder)
        more = _more(window, "]", "list")
    window.at += 1


def _more(window: _Window, end: str, what: str) -> bool:
    """True if another element follows; moves to it, or past `end`."""
    after = window.peek()
    if after == end:
        return False
    if after != ",":
        raise window.error(f"the {what} ends early" if not after else f"',' or {end!r} expected, not {after!r}")
    window.at += 1
    window.peek()
    return True


def read_json(path: Path) -> Any:
    """The content of a small JSON file. Raises `PrepareError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise PrepareError(f"{path}: there is no such file") from error
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{path}: not usable JSON: {error}") from error


def is_id(value: object) -> bool:
    """True for an integer that fits the int32 of the result."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= INT32_MAX


def checked_id(record: object, key: str, what: str) -> int:
    """`record[key]`. Raises `FaultError` unless it is an id."""
    value = record.get(key) if isinstance(record, dict) else None
    if not is_id(value):
        raise FaultError(f"{what} without a usable {key}{_wrong_id(value)}")
    assert isinstance(value, int)
    return value


def _wrong_id(value: object) -> str:
    """The fault of a known wrong form of an id from other tools, or ""."""
    if isinstance(value, str) and value.strip().isdigit():
        return ": it is text in quotes, and ids are numbers"
    if isinstance(value, float) and value.is_integer():
        return ": it is written with a decimal point, and ids are whole numbers"
    return ""


def checked_name(value: object, what: str) -> str:
    """The unchanged name, after a check with `clean_name`. Raises `FaultError`."""
    text = checked_text(value, what)
    if not is_name(text):
        raise FaultError(f"{what} that no graph can have: empty, reserved, too long or with control characters")
    return text


def is_name(text: str) -> bool:
    """True if the readers of graphs accept the name."""
    try:
        clean_name(text, "name")
    except SceneGraphError:
        return False
    return True


def checked_text(value: object, what: str) -> str:
    """`value` as a string. Raises `FaultError` for other types and for bytes that are not UTF-8."""
    if not isinstance(value, str):
        raise FaultError(f"{what} is not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise FaultError(f"{what} is not UTF-8")
    if "\0" in value:
        raise FaultError(f"{what} holds a zero byte")
    return value


def checked_box(record: dict[str, Any], width: int, height: int, outside: bool) -> tuple[tuple[float, ...], bool]:
    """((x, y, w, h) in pixels, True if the box crosses the image's edge). Raises `FaultError`.

    `outside`: boxes completely outside the image pass, as in sg2im.
    """
    box: list[float] = []
    for key in "xywh":
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FaultError(f"box without a number for {key}")
        if isinstance(value, float) and not math.isfinite(value):
            raise FaultError("box with a coordinate that is not finite")
        if abs(value) > INT32_MAX:
            raise FaultError("box with a coordinate that is too large")
        box.append(value)
    x, y, w, h = box
    if not outside and (x >= width or y >= height or x + max(w, 1) <= 0 or y + max(h, 1) <= 0):
        raise FaultError("box outside the image")
    return (x, y, w, h), x < 0 or y < 0 or x + w > width or y + h > height


def place(image: object, what: str = "", value: object = None) -> str:
    """The place of a fault in words: "image 7, object 3"."""
    return f"image {shown(image)}" + (f", {what} {shown(value)}" if what else "")
