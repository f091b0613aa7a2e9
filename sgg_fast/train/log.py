"""The record of a run: a progress bar, TensorBoard, and JSON lines."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sgg_fast import env


class RunLog:
    """Writes in `folder`: log.jsonl and tensorboard/. Rank 0 only; other ranks hold a silent one.

    log.jsonl is appended to: after a resume, a "start" line says from which step the lines below it count.
    """

    def __init__(self, folder: Path, stage: str, first_step: int, num_steps: int, batch: int) -> None:
        self.silent = env.rank() != 0
        self.batch = batch
        self._last = (first_step, time.perf_counter())
        if self.silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(total=num_steps, initial=first_step, desc=stage, unit="step", mininterval=0.5)

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
            "peak_memory_gib": env.peak_memory() / 2**30,
        }
        first, *parts = (f"{name} {values[name]:.2f}/{chance[name]:.2f}" for name in values)
        self._bar.set_postfix_str(", ".join([f"{first} (now/chance)", *parts]))
        for name, value in fields.items():
            self._board.add_scalar(name, value, step)
        self._write({"step": step, **{name: round(value, 6) for name, value in fields.items()}})

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

    def _write(self, fields: dict[str, Any]) -> None:
        self._lines.write(json.dumps(fields) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if not self.silent:
            self._bar.close()
            self._lines.close()
            self._board.close()
