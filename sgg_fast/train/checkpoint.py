"""Checkpoints on disk: written aside, synced, renamed; each with a manifest of its files' SHA-256.

A checkpoint holds weights, optimiser and position. Randomness is a hash of (seed, step, sample), so there is no
generator state. What is in the files is the engine's business (`engine.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgg_fast.config import ConfigError

MANIFEST = "manifest.json"
KEEP = 2
"""Checkpoints that stay on disk; older ones go once a new one is whole."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write aside, sync, rename."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(aside)
    aside.rename(path)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a whole checkpoint in `run`, ascending."""
    names = (p.parent.name for p in (run / "checkpoints").glob(f"step-*/{MANIFEST}"))
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())


def checkpoint_dir(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:07d}"


def save_checkpoint(
    run: Path, step: int, meta: dict[str, Any], write: Callable[[Path], None], barrier: Callable[[], None], rank: int
) -> Path:
    """Let every rank `write` into a folder aside, then let rank 0 make it whole and drop the oldest."""
    final = checkpoint_dir(run, step)
    aside = final.with_name(f".{final.name}.part")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    write(aside)
    barrier()
    if rank == 0:
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        for path in files:
            _sync(path)
        digests = {str(p.relative_to(aside)): _digest(p) for p in files}
        write_json(aside / MANIFEST, {"step": step, **meta, "sha256": digests})
        for folder in {path.parent for path in files}:
            _sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(final.parent)
        for old in checkpoint_steps(run)[:-KEEP]:
            shutil.rmtree(checkpoint_dir(run, old))
    barrier()
    return final


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the recorded hashes. Raises `ConfigError` naming the file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digests = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / MANIFEST}: cannot be read: {error!r}; delete {folder}") from error
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ConfigError(f"{path}: missing or damaged; delete {folder} to go on from the checkpoint before it")
    return manifest
