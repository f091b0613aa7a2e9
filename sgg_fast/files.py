"""Files that appear whole or not at all, and folders with one writer at a time. Knows no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = "lock"
"""The file of a folder that `locked` holds."""


def check_text(words: dict[str, object]) -> None:
    """Raises ValueError for a flag's value that is not UTF-8: what cannot be printed is refused before it is used."""
    for name, value in words.items():
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"--{name.replace('_', '-')}: not UTF-8 text; give another name") from error


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def write_aside(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which becomes `path` at the end, and is deleted after an error.

    durable: file and name are on the disk before this returns, so that a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file that appears whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


ASIDE = ".prepare-"
"""What the name of `write_together`'s folder begins with. One that is there means that a writer was killed."""


@contextlib.contextmanager
def write_together(
    folder: Path, names: Sequence[str], before_moving: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields a folder within `folder` to write the files `names` in; at the end they move out of it, in order.

    The last file is the mark of a complete set: it goes before the first one moves and comes after all others.
    `before_moving` runs while there is no mark. Folders that killed writers left are deleted; hold `locked` around it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
    try:
        yield aside
        for name in names:
            sync(aside / name)
        (folder / names[-1]).unlink(missing_ok=True)
        before_moving()
        for name in names:
            (aside / name).replace(folder / name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, final: Path) -> None:
    """Everything in `aside` on disk, then its name `final`: what has that name is whole, also after a power cut."""
    for path in sorted(aside.rglob("*")):
        sync(path)
    sync(aside)
    discard(final)
    aside.rename(final)
    for folder in (final.parent, final.parents[1]):
        sync(folder)


def discard(folder: Path) -> None:
    """Delete a folder that may not exist; a kill on the way leaves no half of it under its name."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


class InUseError(OSError):
    """Another process holds a folder's lock."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can enter for the same folder. The kernel ends the lock with the process, killed or not.

    Raises `InUseError` where another process holds it, OSError where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft lock outlives a killed process
    try:
        lock.acquire()
    except Timeout as error:
        owner = path.read_text(encoding="utf-8") or "another process"
        raise InUseError(f"{folder} is in use by {owner}: wait until it ends, or choose another --out") from error
    except OSError as error:
        if error.filename is not None:  # the file, and not its lock
            raise
        raise OSError(
            f"{path}: cannot be locked ({error.strerror or error}): the file system of this folder has no working "
            "flock, which keeps two runs apart; choose --out on another, such as a local disk"
        ) from error
    try:
        with contextlib.suppress(OSError):  # on a full disk the name is missing, not the lock
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


VERIFY = "SGG_FAST_VERIFY"
"""Environment variable: if set, earlier results of `sha256s` are ignored."""
_CACHE = "SGG_FAST_CACHE"
_SMALL = 1 << 20
"""Files of at most so many bytes are read every time."""


def sha256s(
    root: Path,
    names: Iterable[str],
    border: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
) -> dict[str, str]:
    """Name -> SHA-256 of files of `root`, computed, or as noted for this path, size and time of change.

    `border(name)` surrounds the reading of each file, to turn its errors into the caller's.
    """
    note = _note_of(root)
    known = {} if os.environ.get(VERIFY) else _read_note(note)
    noted: dict[str, list[Any]] = {}

    def one(name: str) -> str:
        with border(name):
            stat = (root / name).stat()
            if stat.st_size <= _SMALL:
                return sha256_of(root / name)
            size, changed, sha = known.get(name, (None, None, ""))
            if (size, changed) != (stat.st_size, stat.st_mtime_ns):
                sha = sha256_of(root / name)
            noted[name] = [stat.st_size, stat.st_mtime_ns, sha]
            return sha

    wanted = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(wanted, pool.map(one, wanted), strict=True))
    if any(known.get(name) != entry for name, entry in noted.items()):
        _write_note(note, {**known, **noted})
    return found


def _note_of(root: Path) -> Path:
    base = os.environ.get(_CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sgg_fast"
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return Path(base) / "sha256" / f"{name}.json"


def _read_note(path: Path) -> dict[str, list[Any]]:
    """The noted results; {} if the note is missing or damaged, because it only saves time."""
    try:
        text = path.read_text(encoding="ascii")
        files = json.loads(text)["files"]
        return files if _note_text(files) == text else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_note(path: Path, files: dict[str, list[Any]]) -> None:
    """Write the note; a failure is ignored, because the note only saves time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".note-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(_note_text(files))
            os.replace(aside, path)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise


def _note_text(files: dict[str, list[Any]]) -> str:
    body = json.dumps(files, sort_keys=True)
    return json.dumps({"seal": hashlib.sha256(body.encode()).hexdigest(), "files": files}) + "\n"
