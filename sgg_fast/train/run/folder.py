"""The folder of a run: checks that it is writable, has room, and is used by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sgg_fast.config import ConfigError
from sgg_fast.files import LOCK, locked


def _nearest(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def check_folder(folder: Path) -> None:
    """Raises `ConfigError` if `folder` cannot be made or written to, OSError if it is in use; creates nothing.

    Only the first process of a run calls it: others would find its probe file.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise ConfigError(f"--out: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: {nearest} is not writable")
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def check_room(folder: Path, needed: int) -> None:
    """Raises `ConfigError` if the content of `folder` and the free space beside it are less than `needed` bytes."""
    held = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(_nearest(folder)).free
    if free + held < needed:
        more = ((needed - held) >> 20) + 1
        raise ConfigError(
            f"--out {folder}: {free >> 20} MiB free, but checkpoints and result need {more} MiB: free some, or choose "
            "another --out"
        )


_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context in which `path` is written. Raises OSError, one line with the path and the cure, if that fails.

    torch.save reports a full disk as a RuntimeError that only its text identifies.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if shutil.disk_usage(_nearest(path)).free < 1 << 20:
            reason = os.strerror(errno.ENOSPC)
        raise OSError(
            f"{path}: cannot be written ({reason}): free space or make the folder writable; the same command then "
            "continues from the last checkpoint"
        ) from error


def clear(folder: Path) -> None:
    """Delete everything in `folder` except its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
