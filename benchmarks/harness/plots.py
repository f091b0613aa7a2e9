"""Bar charts of a benchmark CSV: a picture per op, a panel per size. Without matplotlib it prints a notice."""

from __future__ import annotations

import importlib.util
import pathlib
from collections import defaultdict
from typing import Any

from benchmarks.harness.output import CsvRow, read_rows

Rows = list[CsvRow]


def pyplot() -> Any:
    """matplotlib's pyplot without a display; None, with a notice, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def best_view(rows: Rows) -> Rows:
    """Captured rows with a flushed L2 if a GPU was measured, else the calls of the CPU."""
    replays = [row for row in rows if (row["call"], row["l2"]) == ("replay", "flushed")]
    return replays or [row for row in rows if row["call"] == "eager"]


def draw(source: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """One PNG per op in `out`; returns their paths. The list is empty without rows or without matplotlib."""
    rows = best_view([row for row in read_rows(source) if row["ms_p50"]])
    plotting = pyplot() if rows else None
    if plotting is None:
        return []
    by_op: dict[str, Rows] = defaultdict(list)
    for row in rows:
        by_op[row["op"]].append(row)
    paths = []
    for op, of_op in by_op.items():
        sizes = list(dict.fromkeys(row["size"] for row in of_op))
        shape = {"figsize": (3.2 * len(sizes), 3.6), "squeeze": False, "constrained_layout": True}
        figure, panels = plotting.subplots(1, len(sizes), **shape)
        for panel, size in zip(panels[0], sizes, strict=True):
            _panel(panel, [row for row in of_op if row["size"] == size], size)
        first = of_op[0]
        figure.suptitle(
            f"{op}: median ms, {first['call']}, L2 {first['l2']}; {first['device']}, torch {first['torch']}, "
            f"triton {first['triton']}, {first['commit']}",
            fontsize=8,
        )
        paths.append(out / f"{source.stem}_{op}.png")
        figure.savefig(paths[-1], dpi=110)
        plotting.close(figure)
    return paths


def _panel(panel: object, rows: Rows, size: str) -> None:
    """Grouped bars: a group per mode and dtype, a colour per backend; whiskers from p20 to p80."""
    groups = list(dict.fromkeys(f"{row['mode']}\n{row['dtype']}" for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for k, backend in enumerate(backends):
        mine = {f"{row['mode']}\n{row['dtype']}": row for row in rows if row["backend"] == backend}
        places = [i for i, group in enumerate(groups) if group in mine]
        p20, p50, p80 = ([float(mine[groups[i]][name]) for i in places] for name in ("ms_p20", "ms_p50", "ms_p80"))
        spread = [[m - a for m, a in zip(p50, p20, strict=True)], [b - m for m, b in zip(p50, p80, strict=True)]]
        panel.bar([i + k / (len(backends) + 1) for i in places], p50, 0.9 / (len(backends) + 1), yerr=spread,
                  label=backend)  # fmt: skip
    panel.set_yscale("log")
    panel.set_xticks([i + 0.4 for i in range(len(groups))], groups, fontsize=6)
    panel.set_title(f"{size}  {rows[0]['shape']}", fontsize=6)
    panel.legend(fontsize=5)
