"""A verdict on one thing, and what a failure of it leaves out of later runs. Knows no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OK, FAILED, UNKNOWN = "ok", "FAILED", "not checked"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the doctor's."""

    name: str
    verdict: str
    """OK, FAILED or UNKNOWN."""
    detail: str
    leaves_out: str = ""
    """A part of `sgg_fast.env.PARTS` that automatic choices do without after a failure; "" for none."""

    def line(self) -> str:
        """For the terminal."""
        return f"{self.verdict:12} {self.name:28} {self.detail}"


def record(findings: Iterable[Finding], machine: str, path: Path) -> dict[str, str]:
    """Write which parts are left out on this machine, and why; an empty record where all is well.

    What was not checked stays as an earlier record of the same machine has it.
    """
    said = list(findings)
    before: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
    kept = before.get("unfit", {}) if before.get("machine") == machine else {}
    checked = {f.leaves_out for f in said if f.leaves_out and f.verdict != UNKNOWN}
    unfit = {part: reason for part, reason in kept.items() if part not in checked}
    for finding in said:
        if finding.leaves_out and finding.verdict == FAILED:
            unfit.setdefault(finding.leaves_out, f"{finding.name}: {finding.detail}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "unfit": unfit}, indent=1) + "\n", encoding="utf-8")
    return unfit
