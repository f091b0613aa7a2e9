"""The tables and figures of `benchmarks.quality`, from the evaluations of its cells. It runs nothing.

Letters: S seeds, N noise seeds of a cell, G graphs, P counterfactual pairs.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import plots
from benchmarks.harness.readme_table import markdown
from benchmarks.quality.cells import result_of
from benchmarks.quality.plan import BASELINES, GRAPHS, NOISE_SEEDS, Cell, System
from sgg_fast.eval import bootstrap
from sgg_fast.eval.bootstrap import Estimate

HEADLINE = "counterfactual"
WHOLE_GRAPH = "without a fault"
_PER_PICTURE = (WHOLE_GRAPH, "entity recall", "entity precision", "relations if present", "SG IoU")
COLUMNS = (HEADLINE, "left/right", "above/below", *_PER_PICTURE, "counts", "KID (toy features)", "diversity")
COMPARED = (HEADLINE, WHOLE_GRAPH)
"""Columns in which SGG-IG is compared with each other system."""
_SHEET_GRAPHS = 6
TITLES = {
    "table1": "Table 1: the same UNet under other conditions",
    "table2": "Table 2: SGG-IG without parts of the paper",
    "table3": "Table 3: SGG-IG without parts that are not the paper's",
    "table4": "Table 4: equal use of boxes, and other forms of text",
}


def _mean_over_noise(values: Any) -> np.ndarray:
    """[N, P] with nulls -> [P], NaN if no picture could be judged."""
    array = np.array(values, dtype=float)
    seen = ~np.isnan(array)
    return np.where(seen.any(axis=0), np.nansum(array, axis=0) / np.maximum(seen.sum(axis=0), 1), np.nan)


def values_of(results: Sequence[dict[str, Any]], column: str) -> np.ndarray:
    """One system's values, one row for each seed: [S, P] or [S, G] if there are single values, else [S, 1]."""
    rows = []
    for result in results:
        pairs = {axis: entry["values"] for axis, entry in result["counterfactual pairs"].items() if entry["pairs"]}
        if column == HEADLINE:
            rows.append(np.concatenate([_mean_over_noise(v) for v in pairs.values()] or [np.empty(0)]))
        elif column in ("left/right", "above/below"):
            rows.append(_mean_over_noise(pairs[column]) if column in pairs else np.empty(0))
        elif column in _PER_PICTURE:
            rows.append(_mean_over_noise(result["per picture"][column]))
        elif column == "diversity":
            rows.append(np.array(result["diversity"]["values"], dtype=float))
        elif column == "counts":
            rows.append(np.array([result["rows"]["drawn"]["counts"]], dtype=float))
        else:
            rows.append(np.array([result["distances"]["toy"][column]], dtype=float))
    return np.stack(rows)


class Comparison:
    """Every finished cell, by system."""

    def __init__(self, out: Path, systems: Sequence[System], seeds: Sequence[int]) -> None:
        self.out, self.seeds = out, seeds
        self.cells = {s: [c for seed in seeds if (c := Cell(s, seed)).done(out)] for s in systems}
        self.results = {s: [result_of(out, c) for c in cells] for s, cells in self.cells.items() if cells}

    def estimates(self, system: System) -> dict[str, Estimate]:
        """Column -> mean and interval."""
        return {column: bootstrap.estimate(values_of(self.results[system], column)) for column in COLUMNS}

    def differences(self, column: str) -> dict[System, tuple[Estimate, int]]:
        """System -> (SGG-IG minus it in `column`, paired by seed, graph and noise; number of common seeds)."""
        whole = next((s for s in self.results if s.name == "sgg"), None)
        found = {}
        for system in self.results if whole else ():
            if system == whole:
                continue
            both = [
                (a, b)
                for c, a in zip(self.cells[whole], self.results[whole], strict=True)
                for d, b in zip(self.cells[system], self.results[system], strict=True)
                if c.seed == d.seed
            ]
            if both:
                mine, theirs = (values_of(side, column) for side in zip(*both, strict=True))
                found[system] = bootstrap.difference(mine, theirs), len(both)
        return found


def text_of(estimate: Estimate) -> str:
    """ "0.625 [0.512, 0.731]", "0.31" for an estimate without an interval, "-" for none."""
    if math.isnan(estimate.mean):
        return "-"
    return f"{estimate.mean:.3f}" if estimate.low == estimate.high else str(estimate)


def tables(comparison: Comparison, names: Sequence[str]) -> str:
    """Markdown of the named tables and of the paired differences."""
    parts = []
    for name in names:
        rows = [
            [s.name, str(len(comparison.results[s])), *(text_of(e) for e in comparison.estimates(s).values())]
            for s in comparison.results
            if name in s.tables
        ]
        parts += [f"## {TITLES[name]}", "\n".join(markdown(["system", "seeds", *COLUMNS], rows))]
    differences = {column: comparison.differences(column) for column in COMPARED}
    for name, baselines in (("its baselines", True), ("itself without parts", False)):
        rows = []
        for system, (_, num) in differences[HEADLINE].items():
            if (system in BASELINES) == baselines:
                found = [differences[column][system][0] for column in COMPARED]
                excluded = ("yes" if e.low > 0 or e.high < 0 else "no" for e in found)
                rows.append([system.name, str(num), *itertools.chain(*zip(map(text_of, found), excluded, strict=True))])
        if rows:
            header = [words for column in COMPARED for words in (f"difference, {column}", "excludes 0")]
            parts += [f"## SGG-IG against {name}", "\n".join(markdown(["sgg minus", "seeds", *header], rows))]
    return "\n\n".join(parts)


def explanation(comparison: Comparison) -> str:
    """Text that explains the columns."""
    result = next(iter(comparison.results.values()))[0]
    accuracy = result["detector"]["accuracy"]["through the VAE"]
    ceiling = result["rows"]["ceiling: real, through the VAE"]
    crowd, diversity = result["distances"]["toy"], result["diversity"]
    pairs = ", ".join(f"{entry['pairs']} {axis}" for axis, entry in result["counterfactual pairs"].items())
    return (
        f"{len(result['per picture']['SG IoU'][0])} graphs of {GRAPHS}: held-out scenes with two of a kind and a chain "
        f"of relations. {HEADLINE}: of pairs from the same noise with one relation turned ({pairs}), the share of "
        f"pictures that follow; chance 0.5, over pairs whose two things are seen in both. Every figure is read by the "
        f"set's detector (on scenes through the VAE: recall {accuracy['recall']:.3f}, precision "
        f"{accuracy['precision']:.3f}); real pictures through the VAE reach entity recall "
        f"{ceiling['entity recall']:.3f}, precision {ceiling['entity precision']:.3f}, relations if present "
        f"{ceiling['relations if present']:.3f}. KID: over {crowd['pictures a side']} pictures, real "
        f"against real {crowd['KID floor, real against real']:.3f}. diversity: distance between pictures of one graph, "
        f"{diversity['features']}; of different real pictures "
        f"{diversity['between real pictures of different graphs']:.3f}. Brackets: 95 % of a bootstrap that "
        f"draws seeds, then graphs; each seed trains anew and draws each graph from {NOISE_SEEDS} noises, the same for "
        "every system."
    )


def write_csv(path: Path, comparison: Comparison, names: Sequence[str]) -> None:
    """One line for each figure of each table, and for each difference."""
    lines: list[tuple[str, str, str, Estimate, int]] = []
    for name in names:
        for system in (s for s in comparison.results if name in s.tables):
            num = len(comparison.results[system])
            lines += [(name, system.name, column, e, num) for column, e in comparison.estimates(system).items()]
    for column in COMPARED:
        for system, (e, num) in comparison.differences(column).items():
            lines.append(("differences", system.name, f"sgg minus it, {column}", e, num))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "system", "figure", "mean", "low", "high", "seeds"])
        for *labels, e, num in lines:
            numbers = ("" if math.isnan(v) else f"{v:.6g}" for v in (e.mean, e.low, e.high))
            writer.writerow([*labels, *numbers, num])


def draw_sheet(path: Path, comparison: Comparison) -> None:
    """The first graphs under every system of Table 1, from the noise of the first seed."""
    from sgg_fast.eval import pictures, report

    systems = [s for s in comparison.results if "table1" in s.tables]
    shared = [seed for seed in comparison.seeds if all(Cell(s, seed).done(comparison.out) for s in systems)]
    if not systems or not shared:
        return
    num = min(_SHEET_GRAPHS, len(comparison.results[systems[0]][0]["per picture"]["SG IoU"][0]))
    graphs = pictures.open_graphs(GRAPHS, 64)
    assert graphs.image is not None
    seed, rows = shared[0], []
    for i in range(num):
        drawn = {
            s.name: pictures.load([Cell(s, seed).folder(comparison.out)
                                   / f"eval/pictures/seed-{NOISE_SEEDS * seed}/{i:05d}.png"])[0]
            for s in systems
        }  # fmt: skip
        rows.append((graphs.graph(i), {"real": graphs.image(i), **drawn}))
    report.contact_sheet(path, rows, columns=1)


def draw_bars(path: Path, comparison: Comparison, names: Sequence[str]) -> None:
    """The headline of every system with its interval, one panel per table; needs matplotlib."""
    if (pyplot := plots.pyplot()) is None:
        return
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5.5 * columns, 3.4 * rows), squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    for panel, name in zip(panels.flat, names, strict=False):
        systems = [s for s in comparison.results if name in s.tables]
        found = [comparison.estimates(s)[HEADLINE] for s in systems]
        means = np.array([e.mean for e in found])
        spread = np.array([[e.mean - e.low for e in found], [e.high - e.mean for e in found]])
        panel.barh([s.name for s in systems], means, xerr=spread, color="#8fb8de", ecolor="#333333", capsize=3)
        panel.axvline(0.5, color="#888888", linestyle="--", linewidth=1)
        panel.invert_yaxis()
        panel.set_xlim(0, 1)
        panel.set_title(TITLES[name], fontsize=9)
        panel.set_xlabel("counterfactual pairs: share that follow (dashed: chance)", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
