"""Files of a cache: safetensors, written aside and renamed, read by memory map, and an index with their digests.

This module does not interpret the tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sgg_fast import digests
from sgg_fast.config import ConfigError
from sgg_fast.files import write_aside

INDEX = "index.json"
"""Written last: a cache with this file is complete."""
_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


class DamagedError(ConfigError):
    """A changed file; the message names the file and the cure."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; delete this file and run the same `prepare cache` command again")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, also if the process or the machine stops."""
    with write_aside(path, durable=True) as aside:
        aside.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], note: Any) -> None:
    """Write a safetensors file with `note` as JSON in its header and a digest of both from before writing.

    The same content gives the same bytes.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    # One key: safetensors' order of several keys changes from process to process.
    metadata = {"note": json.dumps({"note": note, "sha256": _digest(arrays, note)}, sort_keys=True)}
    write_whole(path, save(arrays, metadata))


def _digest(tensors: Mapping[str, np.ndarray], note: Any) -> str:
    """SHA-256 of names, types, shapes and bytes of the tensors, and of the note."""
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_tensors(path: Path, verify: bool = False) -> tuple[dict[str, np.ndarray], Any]:
    """(tensors as memory maps, note) of a file from `write_tensors`. Raises `DamagedError`.

    `verify` compares every byte with the digest in the header. Readers of a finished cache do not need it, because the
    index has a digest of the whole file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.path.getsize(path)
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut")
            header = json.loads(file.read(length))
        held = json.loads(header.pop("__metadata__")["note"])
        tensors = {}
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop or any(side < 0 for side in shape):
                raise ValueError(f"{name} lies nowhere")
            if stop - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or 8 + length + stop > size:
                raise ValueError(f"{name} is cut")
            # A memory map cannot be empty.
            mapped = np.memmap(path, dtype, "r", 8 + length + start, shape) if start < stop else np.empty(shape, dtype)
            tensors[name] = mapped
        if verify and held["sha256"] != _digest(tensors, held["note"]):
            raise ValueError("its bytes are not those that were written (SHA-256 differs)")
        return tensors, held["note"]
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(path, f"not a file of a cache: {error}") from error


def entry_of(path: Path) -> dict[str, Any]:
    """The index entry of a file."""
    return {"file": path.name, "bytes": os.path.getsize(path), "sha256": digests.sha256_of(path)}


def check_files(folder: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Compare every file with its size and digest in the index. Raises `DamagedError` for the first difference."""

    @contextlib.contextmanager
    def named(name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DamagedError(folder / name, f"cannot be read: {error.strerror or error}") from error

    expected = {}
    for entry in entries:
        name = Path(entry["file"]).name
        with named(name):
            size = os.path.getsize(folder / name)
        if size != entry["bytes"]:
            raise DamagedError(folder / name, f"has {size} bytes where {entry['bytes']} were written")
        expected[name] = entry["sha256"]
    if name := digests.changed(folder, expected, named):
        raise DamagedError(folder / name, "its bytes are not those that were written (SHA-256 differs)")


def _render(content: Mapping[str, Any]) -> bytes:
    """The index as bytes; its own digest comes first."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"sha256":"{digest}",\n"content":{body}}}\n'.encode()


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write INDEX of a finished cache."""
    write_whole(folder / INDEX, _render(content))


def read_index(folder: Path) -> dict[str, Any]:
    """The content from `write_index`. Raises `DamagedError` if a byte was changed."""
    path = folder / INDEX
    try:
        raw = path.read_bytes()
        content = json.loads(raw)["content"]
        if not isinstance(content, dict) or _render(content) != raw:
            raise ValueError("its bytes are not those that were written (SHA-256 differs)")
        return content
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(path, f"damaged: {error}") from error
