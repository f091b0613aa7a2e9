"""The row of a kernel benchmark, and where rows of any kind go: to the terminal, and at once to a CSV."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from typing import Any


@dataclasses.dataclass
class Row:
    """One line of the CSV. An empty number means that there is none, and `status` says why."""

    op: str
    mode: str
    size: str
    shape: str
    dtype: str
    backend: str
    call: str
    """eager (a call from Python) or replay (inside a CUDA graph)."""
    l2: str
    """warm, or flushed before every repetition."""
    status: str = "ok"
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    compulsory_bytes: int | None = None
    gb_s: float | None = None
    """Compulsory bytes over the median."""
    copy_gb_s: float | None = None
    """This machine's own copy of a large buffer, read plus written."""
    copy_share: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    """GPU: by torch's profiler. CPU: aten operators that run a kernel."""
    error: float | None = None
    """Largest relative L2 error against float64, outputs and gradients."""
    device: str = ""
    gpu_clocks_mhz: str = ""
    cpu: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    def line(self) -> str:
        """For the terminal."""
        numbers = self.status
        if self.ms_p50 is not None:
            share = "" if self.copy_share is None else f"{100 * self.copy_share:5.1f} % of copy"
            numbers = f"{self.ms_p20:9.4f} {self.ms_p50:9.4f} {self.ms_p80:9.4f} ms {self.gb_s:8.1f} GB/s {share}"
        name = f"{self.op} {self.mode} {self.size} {self.dtype}"
        return f"{name:36} {self.backend:9} {self.call:6} {self.l2:7} {numbers}"


def columns(row_type: type) -> list[str]:
    """The fields of a row, in order: the CSV's header."""
    return [field.name for field in dataclasses.fields(row_type)]


def text(value: Any) -> str:
    """One cell; empty where there is no number."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class Output:
    """Prints each row as its `line()` and appends it to the CSV, so that a run that is killed keeps what it had."""

    def __init__(self, path: pathlib.Path | None, row_type: type, append: bool = False) -> None:
        """append: to the rows of another command that are there, of the same type."""
        self.rows: list[Any] = []
        self._columns, self._file = columns(row_type), None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not (append and path.is_file())
            self._file = path.open("w" if new else "a", newline="", encoding="utf-8")
            if new:
                csv.writer(self._file).writerow(self._columns)

    def add(self, row: Any) -> None:
        """One more row."""
        self.rows.append(row)
        print(row.line(), flush=True)
        if self._file is not None:
            csv.writer(self._file).writerow([text(getattr(row, name)) for name in self._columns])
            self._file.flush()
