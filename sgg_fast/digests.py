"""SHA-256s of the files of models, sets and caches. Large files are read once for each (path, size, time of change).

The results are noted in ~/.cache/sgg_fast (or $SGG_FAST_CACHE). Small files are read every time, all files if
$SGG_FAST_VERIFY is set, as --verify does. It does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sgg_fast.files import write_text

VERIFY = "SGG_FAST_VERIFY"
"""Environment variable: if set, noted results are ignored."""
_CACHE = "SGG_FAST_CACHE"
_SMALL = 1 << 20
"""Bytes up to which a file is read every time."""

Within = Callable[[str], contextlib.AbstractContextManager[None]]
"""Name of a file -> the context in which it is read."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as they are now, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256s(root: Path, names: Iterable[str], within: Within = lambda name: contextlib.nullcontext()) -> dict[str, str]:
    """Name below `root` -> SHA-256, computed, or as noted for this path, size and time of change. Raises OSError."""
    note = _note_of(root)
    known = {} if os.environ.get(VERIFY) else _read_note(note)

    def look(name: str) -> tuple[str, list[Any]]:
        with within(name):
            path = root / name
            stat = path.stat()
            size, changed, sha = known.get(name, (None, None, ""))
            if stat.st_size <= _SMALL or (size, changed) != (stat.st_size, stat.st_mtime_ns):
                sha = sha256_of(path)
            return name, [stat.st_size, stat.st_mtime_ns, sha]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(pool.map(look, names))
    noted = {name: entry for name, entry in found.items() if entry[0] > _SMALL}
    if any(known.get(name) != entry for name, entry in noted.items()):
        with contextlib.suppress(OSError):  # the note only saves time
            write_text(note, sealed({**known, **noted}))
    return {name: sha for name, (_, _, sha) in found.items()}


def changed(root: Path, expected: Mapping[str, Any], within: Within = lambda name: contextlib.nullcontext()) -> str:
    """The first name below `root` whose file has another SHA-256 than `expected`; "" for none. Raises OSError.

    A noted difference is computed again.
    """
    found = sha256s(root, expected, within)
    wrong = (name for name, sha in found.items() if sha != expected[name] and sha256_of(root / name) != expected[name])
    return next(wrong, "")


def sealed(files: Mapping[str, Any]) -> str:
    """A manifest of `files` as text, with a SHA-256 of its own."""
    body = json.dumps(files, sort_keys=True)
    content = {"seal": hashlib.sha256(body.encode()).hexdigest(), "files": files}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _note_of(root: Path) -> Path:
    base = os.environ.get(_CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sgg_fast"
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return Path(base) / "sha256" / f"{name}.json"


def _read_note(path: Path) -> dict[str, list[Any]]:
    """The noted results; {} if the note is missing or damaged, because it only saves time."""
    try:
        text = path.read_text(encoding="ascii")
        files = json.loads(text)["files"]
        return files if sealed(files) == text else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
