"""Where the rows of a benchmark go: to the terminal, and at once to a CSV."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from typing import Any


def columns(row_type: type) -> list[str]:
    """The fields of a row, in order: the CSV's header."""
    return [field.name for field in dataclasses.fields(row_type)]


def text(value: Any) -> str:
    """One cell; empty where there is no number."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class Output:
    """Prints each row as its `line()` and appends it to the CSV, so that a run that is killed keeps what it had."""

    def __init__(self, path: pathlib.Path | None, row_type: type) -> None:
        self.rows: list[Any] = []
        self._columns, self._file = columns(row_type), None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", newline="", encoding="utf-8")
            csv.writer(self._file).writerow(self._columns)

    def add(self, row: Any) -> None:
        """One more row."""
        self.rows.append(row)
        print(row.line(), flush=True)
        if self._file is not None:
            csv.writer(self._file).writerow([text(getattr(row, name)) for name in self._columns])
            self._file.flush()
