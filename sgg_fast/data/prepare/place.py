"""The folder that a preparation writes to: one writer at a time, an earlier result never replaced unasked."""

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
    """OUT for this process alone. Raises `PrepareError`, also where a set is there that is not to be replaced.

    `results`: files of the set, the last of which marks it whole. What a killed preparation left, its hidden folder and
    files that it had moved already, is no set, and the same command goes over it. A preparation that comes to nothing
    still writes its report: to OUT/report.json, or beside that of a set which is there already.
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
                report.write(aside)
            raise PrepareError(f"{error}; what was read and left out is in {path}") from error
