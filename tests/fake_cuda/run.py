"""Runs a command of the project on the stand-in: `python -m fake_cuda.run REPORT.json MODULE|FILE.py ARGUMENTS`.

The command runs as it is, but for what blank memory would make of it: the optimiser's word for "applied" is 1, and
helpers that compare numbers return. What it did goes to REPORT.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sgg_fast.ops import adam as adam_op

from . import blank, cudnn, device

updates: list[dict[str, int]] = []
"""What each optimiser step of an engine cost, in order."""


def _counted(update: Callable[..., Any]) -> Callable[..., Any]:
    """An engine's `update` that notes what it cost; calls within it (of a parent's) are part of it."""

    @functools.wraps(update)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _Inside.now:
            return update(self, *args, **kwargs)
        _answer_applied(self)
        before, num_graphs = device.counts(), len(device.graphs())
        _Inside.now = True
        try:
            result = update(self, *args, **kwargs)
        finally:
            _Inside.now = False
        cost = dataclasses.asdict(device.counts().since(before))
        updates.append({**cost, "graphs": len(device.graphs()) - num_graphs, "applied": int(result.applied)})
        return result

    return run


def _answer_applied(engine: Any) -> None:
    """The words that say whether a step was applied are 1, as they are where all numbers are finite."""
    told, control = getattr(engine, "_told", None), getattr(engine.optimizer, "control", None)
    for word in (told, None if control is None else control[adam_op.APPLIED :]):
        if isinstance(word, torch.Tensor) and word.is_cuda:
            device.declare_flag(word)


class _Inside:
    now = False


def watch_engines() -> None:
    """Every engine's update is counted from here on."""
    from sgg_fast.train.engines import base, choose  # noqa: F401  (choose imports them all)

    def classes(of: type) -> Iterator[type]:
        yield of
        for one in of.__subclasses__():
            yield from classes(one)

    for cls in set(classes(base.Engine)):
        if "update" in vars(cls):
            cls.update = _counted(cls.update)  # type: ignore[attr-defined]


def prepare() -> None:
    """Everything that a process needs before the project's code runs on the stand-in."""
    torch.backends.cudnn.enabled = False
    cudnn.install()
    blank.install()
    watch_engines()


def report(error: BaseException | None, seconds: float) -> dict[str, Any]:
    """What the process did."""
    return {
        "ended": error is None or (isinstance(error, SystemExit) and not error.code),
        "error": None if error is None else "".join(traceback.format_exception_only(error)).strip(),
        "complaints": device.complaints(),
        "totals": dataclasses.asdict(device.counts()),
        "graphs": device.graphs(),
        "updates": updates,
        "outside": device.names(outside=True),
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
    }


def main(argv: list[str]) -> int:
    """Exit code: the command's."""
    path, what, *arguments = argv
    began, error = time.perf_counter(), None
    sys.argv = [what, *arguments]
    prepare()
    try:
        if what.endswith(".py"):
            runpy.run_path(what, run_name="__main__")
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except BaseException as caught:  # border: whatever ends the command is part of the report
        error = caught
        if not isinstance(caught, SystemExit):
            traceback.print_exc()
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(report(error, time.perf_counter() - began)))
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
