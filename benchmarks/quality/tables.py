"""The tables and figures of `benchmarks.quality`, from the evaluations of its cells. It runs nothing.

Letters: S seeds, N noise seeds of a cell, G graphs, P counterfactual pairs.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import plots
from benchmarks.harness.readme_table import markdown
from benchmarks.quality.cells import result_of
from benchmarks.quality.plan import BASELINES, FACTORIAL, GRAPHS, NOISE_SEEDS, PARTS, SGG, Cell, System
from sgg_fast.eval import bootstrap
from sgg_fast.eval.bootstrap import Estimate

HEADLINE = "counterfactual"
WHOLE_GRAPH = "without a fault"
_PER_PICTURE = (WHOLE_GRAPH, "entity recall", "entity precision", "relations if present", "SG IoU")
COLUMNS = (HEADLINE, "left/right", "above/below", *_PER_PICTURE, "counts", "KID (toy features)", "diversity")
COMPARED = (HEADLINE, WHOLE_GRAPH, "entity recall", "relations if present")
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
    """Every finished cell: system -> seed -> result."""

    def __init__(self, out: Path, systems: Sequence[System], seeds: Sequence[int]) -> None:
        self.out, self.seeds = out, seeds
        found = {s: {c.seed: result_of(out, c) for seed in seeds if (c := Cell(s, seed)).done(out)} for s in systems}
        self.results = {system: results for system, results in found.items() if results}

    def estimates(self, system: System) -> dict[str, Estimate]:
        """Column -> mean and interval."""
        results = list(self.results[system].values())
        return {column: bootstrap.estimate(values_of(results, column)) for column in COLUMNS}

    def differences(self, column: str) -> dict[System, tuple[Estimate, int]]:
        """System -> (SGG-IG minus it in `column`, paired by seed, graph and noise; number of common seeds)."""
        whole, found = self.results.get(SGG, {}), {}
        for system, results in self.results.items():
            pairs = [(whole[seed], results[seed]) for seed in results if seed in whole]
            if pairs and system is not SGG:
                found[system] = _difference(pairs, column)
        return found

    def worth(self, column: str) -> dict[str, tuple[Estimate, int]]:
        """Part of the paper -> (mean difference in `column` with and without it, number of pairs of trainings).

        Pairs differ in that part alone; they come from the seeds that have all rows of Table 2. Pairs are redrawn, then
        graphs, so the interval holds how trainings differ. Empty if no seed has all rows.
        """
        rows = {used: self.results.get(system, {}) for used, system in FACTORIAL.items()}
        full = [seed for seed in self.seeds if all(seed in results for results in rows.values())]
        found = {}
        for i, part in enumerate(PARTS) if full else ():
            without = {used: (*used[:i], False, *used[i + 1 :]) for used in FACTORIAL if used[i]}
            pairs = [(rows[used][seed], rows[other][seed]) for used, other in without.items() for seed in full]
            found[part] = _difference(pairs, column)
        return found


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], column: str) -> tuple[Estimate, int]:
    """The first results minus the second ones, and the number of pairs."""
    mine, theirs = (values_of(side, column) for side in zip(*pairs, strict=True))
    return bootstrap.difference(mine, theirs), len(pairs)


def text_of(estimate: Estimate) -> str:
    """ "0.625 [0.512, 0.731]", "0.31" for an estimate without an interval, "-" for none."""
    if math.isnan(estimate.mean):
        return "-"
    return f"{estimate.mean:.3f}" if estimate.low == estimate.high else str(estimate)


def with_rows(comparison: Comparison, names: Sequence[str]) -> list[str]:
    """The tables with a finished row of their own, or that of SGG-IG if there is no other row at all."""
    own = [name for name in names if any(name in s.tables for s in comparison.results if s is not SGG)]
    return own or list(names)


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
        own = {c: {s.name: e for s, e in d.items() if (s in BASELINES) == baselines} for c, d in differences.items()}
        parts += _differences(f"SGG-IG against {name}", "sgg minus", "seeds", own)
    if "table2" in names:
        worth = {column: comparison.worth(column) for column in COMPARED}
        found = _differences("What each part of the paper is worth", "with it minus without it", "pairs", worth)
        about = "Pairs of rows of Table 2 differ in that part alone. Pairs are redrawn, then graphs."
        parts += [*found[:1], about, *found[1:]] if found else []
    return "\n\n".join(parts)


def _differences(
    title: str, what: str, number: str, found: Mapping[str, Mapping[str, tuple[Estimate, int]]]
) -> list[str]:
    """Title and table of differences, from column -> row -> (estimate, number behind it); nothing without rows."""
    rows = []
    for name, (_, num) in found[HEADLINE].items():
        estimates = (found[column][name][0] for column in COMPARED)
        cells = ((text_of(e), "yes" if e.low > 0 or e.high < 0 else "no") for e in estimates)
        rows.append([name, str(num), *itertools.chain(*cells)])
    header = [words for column in COMPARED for words in (f"difference, {column}", "excludes 0")]
    return [f"## {title}", "\n".join(markdown([what, number, *header], rows))] if rows else []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def explanation(comparison: Comparison) -> str:
    """Text that explains the columns."""
    result = next(iter(next(iter(comparison.results.values())).values()))
    accuracy = result["detector"]["accuracy"]["through the VAE"]
    ceiling = result["rows"]["ceiling: real, through the VAE"]
    crowd, diversity = result["distances"]["toy"], result["diversity"]
    pairs = ", ".join(f"{entry['pairs']} {axis}" for axis, entry in result["counterfactual pairs"].items())
    return (
        f"{len(result['per picture']['SG IoU'][0])} graphs of {GRAPHS}: held-out scenes with two of a kind and a chain "
        f"of relations. {HEADLINE}: of pairs from the same noise with one relation turned ({pairs}), the share of "
        f"pictures that follow; chance 0.5, over pairs whose two things are seen in both. Every figure is read by the "
        f"set's detector (on scenes through the VAE: recall {_shown(accuracy['recall'])}, precision "
        f"{_shown(accuracy['precision'])}); real pictures through the VAE reach entity recall "
        f"{_shown(ceiling['entity recall'])}, precision {_shown(ceiling['entity precision'])}, relations if present "
        f"{_shown(ceiling['relations if present'])}. KID: over {crowd['pictures a side']} pictures, real "
        f"against real {_shown(crowd['KID floor, real against real'])}. diversity: distance between pictures of one "
        f"graph, {diversity['features']}; of different real pictures "
        f"{_shown(diversity['between real pictures of different graphs'])}. Brackets: 95 % of a bootstrap that "
        f"draws seeds, then graphs; each seed trains anew and draws each graph from {NOISE_SEEDS} noises, the same for "
        "every system. With one seed it draws graphs alone, and does not tell how two trainings differ."
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
        for part, (e, num) in comparison.worth(column).items() if "table2" in names else ():
            lines.append(("worth", part, f"with it minus without it, {column}", e, num))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "system", "figure", "mean", "low", "high", "number"])
        for *labels, e, num in lines:
            numbers = ("" if math.isnan(v) else f"{v:.6g}" for v in (e.mean, e.low, e.high))
            writer.writerow([*labels, *numbers, num])


def draw_sheet(path: Path, comparison: Comparison) -> None:
    """The first graphs under every system of Table 1, from the noise of the first seed whose pictures are there."""
    from sgg_fast.eval import pictures, report

    systems = [s for s in comparison.results if "table1" in s.tables]

    def drawn_at(system: System, seed: int) -> Path:
        return Cell(system, seed).folder(comparison.out) / f"eval/pictures/seed-{NOISE_SEEDS * seed}"

    shared = [
        seed for seed in comparison.seeds
        if all(seed in comparison.results[s] and drawn_at(s, seed).is_dir() for s in systems)
    ]  # fmt: skip
    if not systems or not shared:
        return
    seed, rows = shared[0], []
    num = min(_SHEET_GRAPHS, len(comparison.results[systems[0]][seed]["per picture"]["SG IoU"][0]))
    graphs = pictures.open_graphs(GRAPHS, 64)
    assert graphs.image is not None
    for i in range(num):
        drawn = {s.name: pictures.load([drawn_at(s, seed) / f"{i:05d}.png"])[0] for s in systems}
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
