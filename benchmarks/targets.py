"""Compares rows with our targets for the graph kernels. It reads CSV rows and measures nothing."""

from __future__ import annotations

import dataclasses

from benchmarks.harness.output import CsvRow
from benchmarks.ops.cases import TARGETED

COPY_SHARE = 0.85
AT_SCALE = ("1e5", "1e6", "1e7")
PAPER_SIZES = ("paper", "vg2", "vg16", "vg64", "vg256")
RIVALS = ("pyg", "compile")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One target, the measured value, and "met", "missed" or "no row"."""

    target: str
    found: str
    verdict: str


def _select(rows: list[CsvRow], **wanted: str) -> list[CsvRow]:
    return [row for row in rows if row["ms_p50"] and all(row[k] == v for k, v in wanted.items())]


def _at_scale(rows: list[CsvRow], op: str, mode: str, dtype: str) -> Finding:
    """Share of the copy bandwidth at the largest size, captured, L2 flushed."""
    target = f"{op} {mode} {dtype}, large: >= {100 * COPY_SHARE:.0f} % of a copy"
    for size in reversed(AT_SCALE):
        found = _select(rows, op=op, mode=mode, dtype=dtype, size=size, backend="ours", call="replay", l2="flushed")
        if found:
            share = float(found[0]["copy_share"])
            return Finding(target, f"{100 * share:.1f} % at {size}", "met" if share >= COPY_SHARE else "missed")
    return Finding(target, "", "no row")


def _against_rivals(rows: list[CsvRow], op: str, mode: str, dtype: str, size: str) -> Finding:
    """Our median over the fastest rival's, captured, with a warm L2."""
    target = f"{op} {mode} {dtype} {size}, replay: faster than {' and '.join(RIVALS)}"
    wanted = {"op": op, "mode": mode, "dtype": dtype, "size": size, "call": "replay", "l2": "warm"}
    ours = _select(rows, backend="ours", **wanted)
    rivals = {name: found[0] for name in RIVALS if (found := _select(rows, backend=name, **wanted))}
    if not ours or not rivals:
        return Finding(target, "", "no row")
    mine = float(ours[0]["ms_p50"])
    best = min(rivals, key=lambda name: float(rivals[name]["ms_p50"]))
    ratio = float(rivals[best]["ms_p50"]) / mine
    absent = "".join(f", {name}: no row" for name in RIVALS if name not in rivals)
    return Finding(target, f"{1e3 * mine:.2f} us, {best} {ratio:.2f}x{absent}", "met" if ratio > 1 else "missed")


def findings(rows: list[CsvRow]) -> list[Finding]:
    """Every target that applies to the rows of a run; GPU rows only."""
    rows = [row for row in rows if not row["device"].startswith("CPU")]
    found = []
    for op in TARGETED:
        for dtype in ("bf16", "fp32"):
            found += [_at_scale(rows, op, mode, dtype) for mode in ("fwd", "bwd")]
            found += [_against_rivals(rows, op, "fwd_bwd", dtype, size) for size in PAPER_SIZES]
    return found
