"""The rows of benchmarks and their output: the terminal, and immediately a CSV."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from sgg_fast.commands.flags import OneLineParser

if TYPE_CHECKING:  # its import takes seconds, and tables and help do not need it
    import torch

    from benchmarks.harness.measure import Times

T = TypeVar("T")


def command_parser(name: str, about: str, written: str) -> OneLineParser:
    """The parser of `benchmarks.NAME` with the flags of every measuring command.

    about: the command's docstring, whose first paragraph is the description. written: the contents of --out.
    """
    parser = OneLineParser(prog=f"python -m benchmarks.{name}", description=about.split("\n\n")[0])
    parser.add_argument("--device", type=_device_name, help="cpu, cuda or cuda:1 (cuda if there is one)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help=f"folder for {written} (default: print only)")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing new starts")
    return parser


def _device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is not cpu, cuda or cuda:NUMBER")
    return text


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of --device, with its number if it is a GPU. Raises `ConfigError` for a GPU that is not here."""
    import torch

    from sgg_fast.config import ConfigError

    found = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cpu":
        return found
    if (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {args.device}: there are {torch.cuda.device_count()} CUDA devices here")
    return torch.device("cuda", found.index or 0)


def in_time(items: Iterable[T], deadline: float) -> Iterator[T]:
    """The items until `deadline` (of `time.perf_counter`); a line says which ones are left out."""
    items = list(items)
    for number, item in enumerate(items):
        if time.perf_counter() > deadline:
            print(f"--limit is spent: {len(items) - number} left out, the first of them {item}")
            return
        yield item


class UnavailableError(RuntimeError):
    """A form cannot run here; its row shows the message."""


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

    def set_times(self, times: Times) -> None:
        self.ms_p20, self.ms_p50, self.ms_p80 = times.p20, times.p50, times.p80


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
    least_ms: float | None = None
    """PREDICTION of the least time on this GPU (`counts/roofline.py`); empty for a GPU without a data sheet there."""
    model_ms: float | None = None
    """PREDICTION for our kernels on this GPU (`counts/model.py`); empty for cases that the machine has not run."""

    def set_rate(self, times: Times, num_bytes: int, copy: float) -> None:
        """Set the times, and the rates of `num_bytes` compulsory bytes; copy: bytes a second of a copy."""
        self.set_times(times)
        rate = num_bytes / (times.p50 * 1e-3)
        self.compulsory_bytes, self.gb_s = num_bytes, rate / 1e9
        self.copy_gb_s, self.copy_share = copy / 1e9, rate / copy

    def line(self) -> str:
        numbers = self.status
        if self.ms_p50 is not None:
            share = "" if self.copy_share is None else f"{100 * self.copy_share:5.1f} % of copy"
            numbers = f"{self.ms_p20:9.4f} {self.ms_p50:9.4f} {self.ms_p80:9.4f} ms {self.gb_s:8.1f} GB/s {share}"
            if self.least_ms is not None:
                model = "" if self.model_ms is None else f", of these kernels {self.model_ms:.4f}"
                numbers += f" PREDICTION: least {self.least_ms:.4f} ms{model}"
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


def failure(error: Exception) -> str:
    """The status of a row whose form raised `error`; running out of memory is no failure."""
    import torch

    kind = "ran out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {type(error).__name__}"
    return f"{kind}: {first_line(error)}"


class Output:
    """Prints each row as its `line()` and appends it to the CSV, so a killed run keeps its rows."""

    def __init__(self, out: pathlib.Path | None, name: str, row_type: type[Row], append: bool = False) -> None:
        """Open the CSV `name` of --out. append: keep the rows of another command in it, of the same type."""
        self.rows: list[Any] = []
        self._columns, self._file = columns(row_type), None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / name
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
