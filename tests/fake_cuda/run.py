"""Runs commands of the project on the stand-in, one after another in one process, and writes down what each did.

    python -m fake_cuda.run REPORT.json WHAT ARGUMENTS .. -- WHAT ARGUMENTS ..

WHAT is a file or a module. The commands run as they are, but for what blank memory would make of them: the optimiser's
word for "applied" is 1. Later commands go on where earlier ones stopped, as a resumed run does, and what an earlier one
keeps alive is seen in them.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgg_fast.ops import adam as adam_op

from . import blank, cudnn, device

SEPARATOR = "--"

PRELOADED = ("sgg_fast.train.trainer", "sgg_fast.pipeline", "sgg_fast.drawing", "torch.utils.tensorboard",
             "xformers.ops")  # fmt: skip
"""Modules that most rows import."""

_updates: list[dict[str, int]] = []
"""What each optimiser step of the command underway cost, in order."""


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
        _updates.append({**cost, "graphs": len(device.graphs()) - num_graphs, "applied": int(result.applied)})
        return result

    return run


def _answer_applied(engine: Any) -> None:
    """The words that say whether a step was applied are 1, as they are where all numbers are finite."""
    from sgg_fast.train.engines.choose import CapturedEngine
    from sgg_fast.train.optim.adam_flat import FlatAdam

    optimizer = engine.optimizer
    words = [engine._outcome] if isinstance(engine, CapturedEngine) else []
    words += [optimizer.control[adam_op.APPLIED :]] if isinstance(optimizer, FlatAdam) else []
    for word in words:
        if word.is_cuda:
            device.declare_flag(word)
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)  # DeepSpeed's asks the other way round
    asked = getattr(zero, "has_overflow", None)
    if asked is not None and not hasattr(asked, "answered"):
        zero.has_overflow = _answered_no(asked)


def _answered_no(question: Callable[..., bool]) -> Callable[..., bool]:
    """Asks, at its price, and says no: a flag on the stand-in reads 1."""

    @functools.wraps(question)
    def ask(*args: Any, **kwargs: Any) -> bool:
        question(*args, **kwargs)
        return False

    ask.answered = True  # type: ignore[attr-defined]
    return ask


class _Inside:
    now = False


def watch_engines() -> None:
    """Every engine's update is counted from here on."""
    from sgg_fast.train.engines import choose

    for engine in (choose.CapturedEngine, choose.EagerEngine, choose.DeepSpeedEngine):
        engine.update = _counted(engine.update)  # type: ignore[method-assign]


def use_gloo() -> None:
    """NCCL asks the driver for more than can be answered: processes talk by gloo, through host memory."""
    import torch.distributed as dist

    begin = dist.init_process_group

    @functools.wraps(begin)
    def by_gloo(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return begin("gloo", *args, **kwargs)

    dist.init_process_group = dist.distributed_c10d.init_process_group = by_gloo  # type: ignore[assignment]


@functools.cache
def prepare() -> None:
    """Everything that a process needs before the project's code runs on the stand-in; once."""
    torch.backends.cudnn.enabled = False
    cudnn.install()
    blank.install()
    use_gloo()
    watch_engines()


def run_command(words: list[str]) -> tuple[int, str]:
    """The exit code, and the error that a traceback ended with."""
    what, sys.argv = words[0], list(words)
    try:
        if what.endswith(".py"):
            runpy.run_path(what, run_name="__main__")
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        return (left.code, "") if isinstance(left.code, int) else (int(left.code is not None), str(left.code))
    except BaseException as error:  # border: whatever ends the command is part of the report
        traceback.print_exc()
        return 1, "".join(traceback.format_exception_only(error)).strip()
    return 0, ""


def report_of(words: list[str]) -> dict[str, Any]:
    """Runs a command; what it did."""
    _updates.clear()
    device.forget_complaints()
    before, num_graphs, began = device.counts(), len(device.graphs()), time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    code, error = run_command(words)
    gc.collect()
    return {
        "command": " ".join(words),
        "code": code,
        "error": error,
        "complaints": device.complaints(),
        "totals": dataclasses.asdict(device.counts().since(before)),
        "graphs": device.graphs()[num_graphs:],
        "updates": list(_updates),
        "outside": device.names(outside=True),
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "left": torch.cuda.memory_allocated(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def serve() -> int:
    """Run what stdin asks for, a line of JSON each, in a fork each; say its pid, then its CPU seconds.

    In the fork this returns the exit code of its commands, so that it ends as a process of its own would.
    """
    prepare()
    for name in PRELOADED:
        importlib.import_module(name)
    torch.cuda._is_in_bad_fork = lambda: False
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setsid()
            os.environ.update(asked["env"])
            _redirect(asked["log"])
            return main(asked["words"])
        print(pid, flush=True)
        usage = os.wait4(pid, 0)[2]
        print(usage.ru_utime + usage.ru_stime, flush=True)
    return 0


def _redirect(log: str) -> None:
    """Input from nowhere, output and errors into the file."""
    for fd, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(log, os.O_WRONLY | os.O_CREAT, 0o644))):
        os.dup2(opened, fd)
    os.dup2(1, 2)


def main(argv: list[str]) -> int:
    """Exit code: 0 where every command ended with 0."""
    if argv == ["--serve"]:
        return serve()
    path, *words = argv
    prepare()
    commands: list[list[str]] = [[]]
    for word in words:
        if word == SEPARATOR:
            commands.append([])
        else:
            commands[-1].append(word)
    reports = []
    for command in commands:
        reports.append(report_of(command))
        Path(path).write_text(json.dumps(reports))
    return int(any(report["code"] for report in reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
