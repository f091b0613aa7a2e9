"""What the stand-in counted, for Python: launches, copies, synchronisations, graphs, memory, and who caused them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import torch

OURS = ("sgg_fast", "sgg_kernels", "benchmarks", "train.py", "infer.py")
"""Parts of paths whose frames count as callers."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Since the process began, or between two moments; bytes for the last three, which differences keep as they are."""

    launches: int
    captured: int
    """Of the launches, into a capture."""
    outside: int
    """Of the launches, elsewhere while a capture was underway."""
    to_device: int
    to_host: int
    on_device: int
    syncs: int
    """Of a stream or the device: the host waits for all that was asked."""
    waits: int
    """For an event, which may lie steps behind."""
    replays: int
    allocations: int
    live: int
    peak: int
    pinned: int

    def since(self, before: Counts) -> Counts:
        """What came after `before`."""
        now, then = dataclasses.astuple(self), dataclasses.astuple(before)
        return Counts(*(a - b for a, b in zip(now[:-3], then[:-3], strict=True)), *now[-3:])


def library() -> ctypes.CDLL:
    """The stand-in in this process. Raises RuntimeError where it is not preloaded."""
    if not os.environ.get("FAKE_CUDA"):
        raise RuntimeError("the stand-in for CUDA is not loaded: start the process with build.environment(OUT)")
    found = ctypes.CDLL("libcuda.so.1")
    found.fake_complaints.restype = found.fake_names.restype = ctypes.c_char_p
    found.fake_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return found


def counts() -> Counts:
    """Now."""
    out = (ctypes.c_long * len(dataclasses.fields(Counts)))()
    library().fake_counters(out)
    return Counts(*out)


def graphs() -> list[int]:
    """Nodes of every graph captured so far, in order."""
    out = (ctypes.c_long * 4096)()
    return list(out[: library().fake_graphs(out, 4096)])


def complaints() -> list[str]:
    """Calls that a device would have refused."""
    return library().fake_complaints().decode().splitlines()


def forget_complaints() -> None:
    """Where a test caused them on purpose."""
    library().fake_forget_complaints()


def names(outside: bool = False) -> dict[str, int]:
    """Launches by kernel; `outside`: those beside a capture."""
    lines = library().fake_names(int(outside)).decode().splitlines()
    return {name: int(number) for number, _, name in (line.partition("\t") for line in lines)}


def declare_flag(word: torch.Tensor) -> None:
    """From here on the first fp32 number of a device tensor reads 1 on the host. It must outlive the process's use."""
    library().fake_flag(ctypes.c_void_p(word.data_ptr()))


def _caller(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in OURS) and "fake_cuda" not in path:
            root = next(part for part in OURS if part in path)
            return f"{root}{path.partition(root)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def callers(kinds: tuple[str, ...] = ("sync",)) -> Iterator[Counter[str]]:
    """Inside: "kind name <- file:line" of ours, counted; kinds: "sync", "wait", "launch" (eager ones, copies too)."""
    found: Counter[str] = Counter()

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
    def note(kind: bytes, name: bytes) -> None:
        if kind.decode() in kinds:
            found[f"{kind.decode()} {name.decode()} <- {_caller(sys._getframe(1))}"] += 1

    library().fake_watch(note)
    try:
        yield found
    finally:
        library().fake_watch(None)
