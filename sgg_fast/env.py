"""The process and its device: where to compute, which rank this is, how much memory was used."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # its import takes seconds, which a refusal does not wait for
    import torch

logger = logging.getLogger(__name__)


def device() -> torch.device:
    """This process's device: its CUDA card by LOCAL_RANK, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def local_rank() -> int:
    """Index of this process on its machine, as torchrun and DeepSpeed's launcher set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    """Index of this process in the run."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes in the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def peak_memory() -> int:
    """Bytes at their highest so far: the CUDA allocator's, or the resident set of this process on CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS = ("kernels", "attention", "capture", "fused")
"""What automatic choices can do without: Triton's kernels, xformers, CUDA graphs, the fused UNet."""

_trusting = False


def machine() -> str:
    """The device and the versions that a doctor's verdict holds for."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name}, torch {torch.__version__}, triton {triton}"


def doctor_record() -> Path:
    """Where `sgg-doctor` leaves which parts failed."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "sgg_fast" / "doctor.json"


def unfit(part: str) -> str:
    """Why an automatic choice leaves `part` out on this machine, from the last `sgg-doctor`; "" where it does not."""
    assert part in PARTS
    return "" if _trusting else _record().get(part, "")


@functools.cache
def _record() -> dict[str, str]:
    said = read_doctor(doctor_record())
    return said["unfit"] if said["machine"] == machine() else {}


def read_doctor(path: Path) -> dict[str, Any]:
    """A doctor's record: "machine", and "unfit", part -> reason. Empty if there is none; a damaged one is logged."""
    empty: dict[str, Any] = {"machine": "", "unfit": {}}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        usual = [part in PARTS and isinstance(why, str) for part, why in said["unfit"].items()]
        if not isinstance(said["machine"], str) or not all(usual):
            raise ValueError("wrong content")
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s: cannot be read (%s), so nothing is left out: run sgg-doctor again", path, error)
        return empty
    return said


@contextlib.contextmanager
def everything_fit() -> Iterator[None]:
    """Inside, nothing is left out: for the doctor itself."""
    global _trusting
    before, _trusting = _trusting, True
    try:
        yield
    finally:
        _trusting = before
        _record.cache_clear()
