"""A verdict on one part, and the part that later runs leave out after a failure. It does not import torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from sgg_fast import env
from sgg_fast.files import write_text

OK, FAILED, UNKNOWN = "ok", "FAILED", "not checked"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's output."""

    name: str
    verdict: str
    """OK, FAILED or UNKNOWN."""
    detail: str
    leaves_out: str = ""
    """A part of `sgg_fast.env.PARTS` that automatic choices leave out after a failure; "" for none."""

    def line(self) -> str:
        """The finding as text."""
        return f"{self.verdict:12} {self.name:28} {self.detail}"


def record(findings: Iterable[Finding], machine: str, path: Path) -> dict[str, str]:
    """Write which parts are left out on this machine, with the reasons; an empty record if nothing failed.

    Parts that were not checked keep their entry in an earlier record of the same machine.
    """
    found = list(findings)
    before = env.read_doctor(path)
    kept = before["unfit"] if before["machine"] == machine else {}
    checked = {f.leaves_out for f in found if f.leaves_out and f.verdict != UNKNOWN}
    unfit = {part: reason for part, reason in kept.items() if part not in checked}
    for finding in found:
        if finding.leaves_out and finding.verdict == FAILED:
            unfit.setdefault(finding.leaves_out, f"{finding.name}: {finding.detail}")
    write_text(path, json.dumps({"machine": machine, "unfit": unfit}, indent=1) + "\n")
    return unfit
