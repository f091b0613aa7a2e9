"""Removes the lock that a killed build of a torch extension leaves behind. Every later start would wait for it forever.

torch guards a build by a file that it holds open and deletes at the end. While the file exists, other processes wait
silently.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from sgg_fast import env
from sgg_fast.config import ConfigError

logger = logging.getLogger(__name__)


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open. Processes of other users cannot be inspected."""
    wanted = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:  # the process ended, the file was closed, or it belongs to another user
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _builders(folder: Path) -> list[int]:
    """Ids of the processes that work in `folder`: ninja and compilers can outlive the process that started them."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # the process ended, or belongs to another user
            if link.samefile(folder) and int(link.parts[2]) != os.getpid():
                found.append(int(link.parts[2]))
    return found


def _wait_for_builders(folder: Path, patience: float) -> None:
    """Wait until no process works in `folder`. Raises `ConfigError`, naming them, after `patience` seconds."""
    end, logged = time.monotonic() + patience, False
    while builders := _builders(folder):
        those = ", ".join(map(str, builders))
        if time.monotonic() > end:
            raise ConfigError(
                f"--deepspeed: processes {those} still build in {folder}: wait until they end, or kill them"
            )
        if not logged:
            logger.warning(
                "%s: compilers of a build that was killed are at work (processes %s): waiting", folder, those
            )
        logged = True
        time.sleep(0.1)


def _locks() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return sorted(Path(given).glob("deepspeed_*/lock"))
    return sorted(Path(get_default_build_root()).glob("*/deepspeed_*/lock"))


def remove_stale_locks(wait: float = 1.0, patience: float = 600.0) -> None:
    """Delete the build locks of DeepSpeed's extensions that no process has open, and log each deletion.

    wait: seconds after which a lock must still be closed: a build that ends closes its lock and then deletes it.
    patience: seconds to wait for compilers that a killed build left running, because two builds would write the same
    files. Only the first process of a machine calls this. No process calls it if several machines may share the
    folder, because processes of other machines are invisible.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if env.local_rank() != 0 or here < env.world_size() or not Path("/proc/self/fd").is_dir():
        return
    for lock in _locks():
        try:
            if _is_open(lock):
                continue
            time.sleep(wait)
            if _is_open(lock):
                continue
            _wait_for_builders(lock.parent, patience)
            lock.unlink()
        except FileNotFoundError:  # a build has just ended
            continue
        logger.warning("%s: left behind by a build that was killed, and no process has it open: deleted", lock)
