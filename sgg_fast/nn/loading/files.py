"""The files of a model folder: bounded JSON reading, and the SHA-256s of an export in sha256.json.

Sizes are compared at every load, bytes by the rule of `sgg_fast.digests`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sgg_fast import digests
from sgg_fast.graph import shown

from .border import ModelError, border

MANIFEST = "sha256.json"
_LOADED = (".json", ".safetensors", ".txt")
"""Endings of the files that loading reads; cards and code are excluded."""
_MOST_JSON = 1 << 28
_CURE = f"get the folder again; if you changed it yourself, delete its {MANIFEST}"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; `what` names the file in messages. Raises `ModelError`."""
    with border(what):
        if path.stat().st_size > _MOST_JSON:
            raise ModelError(f"{path.stat().st_size} bytes of JSON; at most {_MOST_JSON}")
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ModelError(f"not UTF-8 text (byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ModelError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
        except RecursionError as error:
            raise ModelError("not usable JSON: nested too deeply") from error
        if not isinstance(content, dict):
            raise ModelError(f"must be a JSON object, not {shown(content)}")
        return content


def files_of(root: Path) -> list[str]:
    """Sorted names of the files that loading reads, in `root` and in its direct folders."""
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern)]
    return sorted(
        path.relative_to(root).as_posix()
        for path in found
        if path.suffix in _LOADED and path.name != MANIFEST and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )  # fmt: skip


def forget_places(root: Path) -> None:
    """Remove from an export the paths of its parts on this machine, so that equal models give equal bytes."""
    for name in files_of(root):
        if name.endswith("config.json") or name == "model_index.json":
            content = read_json(root / name, name)
            if content.pop("_name_or_path", None) is not None:
                (root / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def seal(root: Path) -> Path:
    """Write the manifest of an export (size and SHA-256 of every loaded file); returns its path. Raises OSError."""
    (root / MANIFEST).unlink(missing_ok=True)
    names = files_of(root)
    files = {name: {"bytes": (root / name).stat().st_size, "sha256": digests.sha256_of(root / name)} for name in names}
    (root / MANIFEST).write_text(digests.sealed(files), encoding="ascii")
    return root / MANIFEST


def check(root: Path, parts: Iterable[str] | None = None) -> None:
    """Compare a folder with its manifest or the manifest of its parent, if any: all files, or those of `parts`.

    Raises `ModelError` for the first file that is missing, new or changed since the export.
    """
    wanted = set(parts) if parts is not None else None
    if not (root / MANIFEST).is_file():
        if not (root.parent / MANIFEST).is_file():
            return
        root, wanted = root.parent, {root.name}
    entries = _entries(root)

    def counts(name: str) -> bool:
        return wanted is None or "/" not in name or name.split("/")[0] in wanted

    if strays := [name for name in files_of(root) if name not in entries and counts(name)]:
        raise ModelError(f"{strays[0]}: not among the files that were exported: delete it, or {_CURE}")
    _compare(root, {name: entry for name, entry in entries.items() if counts(name)})


def check_file(path: Path) -> None:
    """Compare one file with the manifest of its folder or of the parent, if any. Raises `ModelError`."""
    for root in (path.parent, path.parents[1]):
        if (root / MANIFEST).is_file():
            name = path.relative_to(root).as_posix()
            _compare(root, {each: entry for each, entry in _entries(root).items() if each == name})


def _compare(root: Path, due: dict[str, dict[str, Any]]) -> None:
    for name, entry in due.items():
        with border(name):
            size = (root / name).stat().st_size
            if size != entry["bytes"]:
                raise ModelError(f"has {size} bytes where {entry['bytes']} were exported: {_CURE}")
    if name := digests.changed(root, {name: entry["sha256"] for name, entry in due.items()}, border):
        raise ModelError(f"{name}: its bytes are not those that were exported (SHA-256 differs): {_CURE}")


def _entries(root: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries. Raises `ModelError` if a byte of the manifest was changed."""
    content = read_json(root / MANIFEST, MANIFEST)
    files = content.get("files")
    with border(MANIFEST):
        if not isinstance(files, dict) or (root / MANIFEST).read_bytes() != digests.sealed(files).encode("ascii"):
            raise ModelError(f"its bytes are not those that were written: {_CURE}")
    return files


def digest(root: Path) -> str:
    """Identity of a model: a hash of every byte that loading reads, without the provenance in model_index.json."""
    whole = hashlib.sha256()
    for name, sha in digests.sha256s(root, files_of(root), border).items():
        if name == "model_index.json":
            content = read_json(root / name, name)
            content.pop("provenance", None)
            sha = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        whole.update(f"{name} {sha}\n".encode())
    return whole.hexdigest()[:32]
