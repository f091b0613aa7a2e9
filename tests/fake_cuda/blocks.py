"""What is alive on the device at the highest point of a block of code, by the line that allocated it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

NUM_SHOWN = 60
DEPTH = 3
"""Frames of a block's caller that name it."""
SKIPPED = ("torch/nn/modules/module.py", "fake_cuda/run.py", "torch/utils/_contextlib.py")


def _caller(frames: list[dict[str, Any]]) -> str:
    own = [f for f in frames if not any(part in f["filename"] for part in SKIPPED) and f["line"]]
    return " < ".join(f"{f['filename'].rsplit('/', 1)[-1]}:{f['line']} {f['name']}" for f in own[:DEPTH]) or "backward"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Context; at its end it prints the largest callers of what was alive at the peak."""
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=2_000_000)
    try:
        yield
    finally:
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(None)
        show(events)


def show(events: list[dict[str, Any]]) -> None:
    """Print the peak of a trace, counted from its beginning, and what was alive there."""
    live: dict[int, int] = {}
    now = best = at = 0
    for i, event in enumerate(events):
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"]
            now += event["size"]
        elif event["action"] == "free_completed":
            now -= live.pop(event["addr"], 0)
        if now > best:
            best, at = now, i
    found: dict[int, dict[str, Any]] = {}
    for event in events[: at + 1]:
        if event["action"] == "alloc":
            found[event["addr"]] = event
        elif event["action"] == "free_completed":
            found.pop(event["addr"], None)
    sizes, numbers = Counter[str](), Counter[str]()
    for event in found.values():
        name = _caller(event.get("frames", []))
        sizes[name] += event["size"]
        numbers[name] += 1
    print(f"{best / 2**30:.3f} GiB above the beginning, at event {at} of {len(events)}")
    for name, size in sizes.most_common(NUM_SHOWN):
        print(f"{size / 2**20:10.1f} MiB {numbers[name]:5}  {name}")
