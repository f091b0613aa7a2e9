"""Checks whether new GPU rows are slower than the committed ones of the same GPU.

    python -m benchmarks.regress NEW.csv                       # against every CSV of benchmarks/results
    python -m benchmarks.regress OUT --against old.csv         # all CSVs of a folder, against one file

Two rows are of one kind if op, mode, size, shape, dtype, backend, call, L2 and GPU (of a pre-training step: form,
sizes, batch and GPU) are the same; of several old ones the newest counts. Medians are compared. CPU rows are never
compared, because those machines are shared and throttled; cold starts are not either, because each ran once. Exit
status 1 if a row is more than `--more-than` per cent slower, 2 for unreadable input.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
from collections.abc import Iterable

from benchmarks.harness.output import CsvRow
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

KIND = ("op", "mode", "size", "shape", "dtype", "backend", "call", "l2", "form", "sizes", "batch", "device")
"""Columns that are equal in two comparable rows; empty if a table lacks the column."""
NEEDED = {"ms_p50", "device", "commit", "date"}
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
LISTED = 40


@dataclasses.dataclass(frozen=True)
class Pair:
    """A new row and the old one of its kind."""

    new: CsvRow
    old: CsvRow

    @property
    def ratio(self) -> float:
        """New median over old median."""
        return float(self.new["ms_p50"]) / float(self.old["ms_p50"])

    def line(self) -> str:
        """The pair as text."""
        name = " ".join(value for value in _kind(self.new)[:-1] if value)
        before, now = float(self.old["ms_p50"]), float(self.new["ms_p50"])
        was = f"{self.old['commit']} of {self.old['date']}"
        return f"{self.ratio:6.2f} x  {before:.4f} -> {now:.4f} ms  {name} ({was})"


def _kind(row: CsvRow) -> tuple[str, ...]:
    return tuple(row.get(column) or "" for column in KIND)


def _counts(row: CsvRow) -> bool:
    whole = all(row[name] is not None for name in NEEDED)  # a row that was cut off lacks its end
    return whole and bool(row["ms_p50"]) and not row["device"].startswith("CPU") and row.get("mode") != "cold start"


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def read(path: pathlib.Path) -> list[CsvRow]:
    """The comparable rows of a file or of every CSV in a folder. Raises ValueError for a file of another kind."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    rows = []
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8") as opened:
                reader = csv.DictReader(opened)
                if missing := NEEDED - set(reader.fieldnames or ()):
                    if path.is_dir():
                        continue  # curves and other tables lie beside the benchmarks' rows
                    raise ValueError(f"{file}: no rows of a benchmark: it lacks the column {min(missing)}")
                for row in filter(_counts, reader):
                    if not _is_time(row["ms_p50"]):
                        raise ValueError(f"{file}: line {reader.line_num}: ms_p50 is no time: {row['ms_p50'][:40]}")
                    rows.append(row)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from error
    return rows


def pairs(new: Iterable[CsvRow], old: Iterable[CsvRow]) -> list[Pair]:
    """Every new row that has an old one of its kind."""
    newest: dict[tuple[str, ...], CsvRow] = {}
    for row in sorted(old, key=lambda row: row["date"]):
        newest[_kind(row)] = row
    return [Pair(row, newest[_kind(row)]) for row in new if _kind(row) in newest]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="python -m benchmarks.regress", description=__doc__.split("\n\n")[0])
    parser.add_argument("new", type=pathlib.Path, help="CSV, or a folder of such")
    parser.add_argument("--against", type=pathlib.Path, default=RESULTS, help="CSV or folder (benchmarks/results)")
    parser.add_argument("--more-than", type=float, default=10.0, metavar="PERCENT", help="that is slower (10)")
    return parser.parse_args(argv)


@command("regress")
def main(argv: list[str] | None) -> int:
    """Exit status 1 if a row became slower, 2 for unreadable input."""
    args = parse(argv)
    if not args.new.exists():
        raise ValueError(f"{args.new}: there is no such file or folder")
    new, old = read(args.new), read(args.against)
    found = pairs(new, old)
    slower = sorted((p for p in found if p.ratio > 1 + args.more_than / 100), key=lambda p: -p.ratio)
    print(f"{len(new)} new GPU rows, {len(found)} with a committed row of the same kind and GPU")
    for pair in slower[:LISTED]:
        print(pair.line())
    if len(slower) > LISTED:
        print(f"and {len(slower) - LISTED} more")
    print(f"{len(slower)} are more than {args.more_than:g} % slower" if slower else "none is slower")
    return int(bool(slower))
