"""The output folder of a preparation: one writer at a time, and no replacement of a result without --overwrite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sgg_fast.config import ConfigError
from sgg_fast.data.jsonl import check_link
from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.report import REFUSED, REPORT, Report
from sgg_fast.files import ASIDE, locked, write_aside


@contextlib.contextmanager
def preparing(
    out: Path, results: Sequence[str], overwrite: bool, report: Report, images: Path | None = None
) -> Iterator[None]:
    """Lock OUT for this process. Raises `PrepareError`, also for an existing set without `overwrite`.

    `results`: files of the set; the last one marks the set complete. The remains of a killed preparation (its hidden
    folder and moved files) are not a set, and the same command replaces them. A failed preparation still writes its
    report: to OUT/report.json, or to OUT/refused.json beside an existing set.
    """
    if out.exists() and not out.is_dir():
        raise PrepareError(f"--out {out}: is a file; give a folder")
    try:
        check_link(out, images)
    except ConfigError as error:
        raise PrepareError(str(error)) from error
    with locked(out):
        there = [name for name in results if (out / name).exists()]
        whole = results[-1] in there
        killed = any(out.glob(f"{ASIDE}*"))
        if not overwrite and (whole or (there not in ([], [REPORT]) and not killed)):
            raise PrepareError(f"{out} already holds a set; --overwrite replaces it (there: {', '.join(there)})")
        try:
            yield
        except PrepareError as error:
            path = out / (REFUSED if whole else REPORT)
            with write_aside(path) as aside:
                aside.write_text(report.text(), encoding="ascii")
            raise PrepareError(f"{error}; what was read and left out is in {path}") from error
