"""The record of a run: a progress bar, TensorBoard, and JSON lines."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sgg_fast import env
from sgg_fast.config import ConfigError
from sgg_fast.files import write_aside
from sgg_fast.train.run.folder import writing


class RunLog:
    """Writes in `folder`: log.jsonl and tensorboard/. Rank 0 only; other ranks hold a silent one.

    A resumed run goes on in the same files: what a run that was killed had logged of later steps than its checkpoint
    is taken out first, so no step is there twice. A "start" line is written at each start.
    """

    def __init__(
        self, folder: Path, stage: str, first_step: int, num_steps: int, batch: int, planned: int | None = None
    ) -> None:
        """planned: bytes of memory that the planner expects, to be written beside those measured."""
        self.silent = env.rank() != 0
        self.planned = planned
        self.batch, self.num_steps = batch, num_steps
        self._last = (first_step, time.perf_counter())
        if self.silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        with writing(self._path):
            _forget_after(self._path, first_step)
            self._lines = self._path.open("a", encoding="utf-8")
        self._board_path, self._hook = folder / "tensorboard", threading.excepthook
        threading.excepthook = self._thread_failed
        with writing(self._board_path):
            self._board = SummaryWriter(str(self._board_path), purge_step=first_step)
        self._bar = tqdm(total=num_steps, initial=first_step, desc=stage, unit="step", mininterval=0.5, disable=None)

    def advance(self) -> None:
        """One step is done."""
        if not self.silent:
            self._bar.update(1)

    def record(self, step: int, values: dict[str, float], chance: dict[str, float]) -> None:
        """Means of every loss term since the last record, with their values at chance, as of step number `step`."""
        if self.silent:
            return
        (then_step, then), now = self._last, time.perf_counter()
        self._last = (step, now)
        fields = {
            **values,
            **{f"{name}_at_chance": value for name, value in chance.items()},
            "images_per_s": self.batch * (step - then_step) / (now - then),
            "remaining_s": (self.num_steps - step) * (now - then) / (step - then_step),
            "peak_memory_gib": env.peak_memory() / 2**30,
            **({} if self.planned is None else {"planned_memory_gib": self.planned / 2**30}),
        }
        first, *parts = (f"{name} {values[name]:.2f}/{chance[name]:.2f}" for name in values)
        self._bar.set_postfix_str(", ".join([f"{first} (now/chance)", *parts]))
        self._draw(step, fields)
        self._write({"step": step, **{name: round(value, 6) for name, value in fields.items()}})

    def validated(self, step: int, values: dict[str, float], chance: dict[str, float]) -> None:
        """Accuracies on held-out pairs beside what they are at chance."""
        if self.silent:
            return
        shown = ", ".join(f"{name} {value:.3f}/{chance[name]:.3f}" for name, value in values.items())
        with contextlib.suppress(OSError):  # of a terminal that was closed
            self._bar.write(f"held-out pairs at step {step} (now/chance): {shown}", file=sys.stderr)
        fields = {**values, **{f"{name}_at_chance": value for name, value in chance.items()}}
        self._draw(step, {f"validation/{name}": value for name, value in fields.items()})
        self._write({"event": "validation", "step": step, **{name: round(x, 6) for name, x in fields.items()}})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (sample sheets, checkpoints) does not count in images_per_s."""
        began = time.perf_counter()
        yield
        step, then = self._last
        self._last = (step, then + time.perf_counter() - began)

    def event(self, **fields: Any) -> None:
        """A line that is not a step: the run's settings, a checkpoint, a sample sheet."""
        if not self.silent:
            self._write(fields)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        with writing(self._board_path):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread keeps its error for the next value, which raises it: no traceback of the thread too."""
        of_tensorboard = type(failed.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(failed.exc_value, OSError)):
            self._hook(failed)

    def _write(self, fields: dict[str, Any]) -> None:
        with writing(self._path):
            self._lines.write(json.dumps(fields) + "\n")
            self._lines.flush()

    def close(self, failed: bool = False) -> None:
        """Flush and close everything. Raises OSError naming what cannot be written, but not where the run failed."""
        if self.silent:
            return
        self._bar.close()
        try:
            for path, file in ((self._path, self._lines), (self._board_path, self._board)):
                with contextlib.suppress(OSError) if failed else contextlib.nullcontext(), writing(path):
                    file.close()
        finally:
            threading.excepthook = self._hook

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def read_log(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, text, fields) of a log's lines; one that a kill cut off is skipped.

    Raises `ConfigError` for a line of JSON that no run writes.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(fields, dict) or type(fields.get("step", 0)) is not int:
                raise ConfigError(f"{path}: line {number} has no whole number as its step: delete the line or the file")
            yield number, line, fields


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps above `step`, and a last line that a kill cut off.

    Raises `ConfigError` for a line of JSON that no run writes: it may be of use to its owner.
    """
    if not path.exists():
        return
    with write_aside(path) as aside, aside.open("w", encoding="utf-8") as kept:
        kept.writelines(line for _, line, fields in read_log(path) if fields.get("step", 0) <= step)
