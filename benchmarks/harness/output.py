"""The rows of benchmarks and their output: the terminal, and immediately a CSV."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # its import takes seconds, and tables and help do not need it
    import torch


def device(text: str) -> torch.device:
    """A device by its name, with its number if it is a GPU. Raises `ArgumentTypeError` for one that is not here."""
    import torch

    kind, _, number = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not (text == "cuda" or number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is none of cpu, cuda, cuda:N")
    if int(number or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text[:40]}: there are {torch.cuda.device_count()} CUDA devices here")
    return torch.device("cuda", int(number or 0))


def add_flags(parser: argparse.ArgumentParser, written: str) -> None:
    """Add the flags of every measuring command. written: the contents of --out."""
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=here, help="%(default)s")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help=f"folder for {written} (default: print only)")


def file_in(out: pathlib.Path | None, name: str) -> pathlib.Path | None:
    """The file `name` of --out; None without --out."""
    return out and out / name


CsvRow = dict[str, str]
"""A row read from a CSV."""


@dataclasses.dataclass(kw_only=True)
class Row:
    """Fields at the end of every row. An empty number means that there is none, and `status` gives the reason."""

    status: str = "ok"
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    device: str = ""
    gpu_clocks_mhz: str = ""
    cpu: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    def line(self) -> str:
        """The row as text."""
        raise NotImplementedError


@dataclasses.dataclass
class OpRow(Row):
    """One operator in one form."""

    op: str
    mode: str
    size: str
    shape: str
    dtype: str
    backend: str
    call: str
    """eager (a call from Python) or replay (launch of a captured CUDA graph)."""
    l2: str
    """warm, or flushed before every repetition."""
    compulsory_bytes: int | None = None
    gb_s: float | None = None
    """Compulsory bytes over the median time."""
    copy_gb_s: float | None = None
    """Read plus written bytes of this machine's own copy of a large buffer, per second."""
    copy_share: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    """GPU: by torch's profiler. CPU: aten operators that run a kernel."""
    error: float | None = None
    """Largest relative L2 error against float64, outputs and gradients."""

    def line(self) -> str:
        numbers = self.status
        if self.ms_p50 is not None:
            share = "" if self.copy_share is None else f"{100 * self.copy_share:5.1f} % of copy"
            numbers = f"{self.ms_p20:9.4f} {self.ms_p50:9.4f} {self.ms_p80:9.4f} ms {self.gb_s:8.1f} GB/s {share}"
        name = f"{self.op} {self.mode} {self.size} {self.dtype}"
        return f"{name:36} {self.backend:9} {self.call:6} {self.l2:7} {numbers}"


def columns(row_type: type[Row]) -> list[str]:
    """The CSV's header: a row's own fields, then those of every row."""
    shared = [field.name for field in dataclasses.fields(Row)]
    return [name for field in dataclasses.fields(row_type) if (name := field.name) not in shared] + shared


def read_rows(path: pathlib.Path) -> list[CsvRow]:
    """The rows of a file; none if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def text(value: Any) -> str:
    """One cell; empty if there is no number."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def first_line(error: BaseException) -> str:
    """The text of an error for a row."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


class Output:
    """Prints each row as its `line()` and appends it to the CSV, so a killed run keeps its rows."""

    def __init__(self, path: pathlib.Path | None, row_type: type[Row], append: bool = False) -> None:
        """Open the CSV. append: keep the rows of another command in it, of the same type."""
        self.rows: list[Any] = []
        self._columns, self._file = columns(row_type), None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not (append and path.is_file())
            self._file = path.open("w" if new else "a", newline="", encoding="utf-8")
            if new:
                csv.writer(self._file).writerow(self._columns)

    def add(self, row: Any) -> None:
        """Print and write one row."""
        self.rows.append(row)
        print(row.line(), flush=True)
        if self._file is not None:
            csv.writer(self._file).writerow([text(getattr(row, name)) for name in self._columns])
            self._file.flush()
