"""The tables of `benchmarks.quality`, from the evaluations of its cells."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from support.cases.benchmark import SYSTEM

from benchmarks.quality.plan import FACTORIAL, PARTS, Cell
from benchmarks.quality.tables import Comparison
from sgg_fast.eval import bootstrap


def test_tables_hold_what_the_evaluations_wrote(compared):
    out, _ = compared
    with (out / "results" / "quality.csv").open(newline="") as file:
        rows = {(r["table"], r["system"], r["figure"]): r for r in csv.DictReader(file)}
    headlines = {}
    for name in ("text, zero-shot", "sgg"):
        result = json.loads((Cell(SYSTEM[name], 0).folder(out) / "eval" / "eval.json").read_text())
        expected = {
            "entity recall": np.nanmean(np.nanmean(np.array(result["per picture"]["entity recall"], float), axis=0)),
            "counts": result["rows"]["drawn"]["counts"],
            "diversity": np.mean(result["diversity"]["values"]),
        }
        for figure, value in expected.items():
            assert float(rows["table1", name, figure]["mean"]) == pytest.approx(value, rel=1e-4), figure
        pairs = [np.array(e["values"], float) for e in result["counterfactual pairs"].values() if e["pairs"]]
        headlines[name] = np.array([[_mean(column) for side in pairs for column in side.T]])
    difference = bootstrap.difference(headlines["sgg"], headlines["text, zero-shot"])
    assert ("differences", "text, zero-shot", "sgg minus it, without a fault") in rows
    row = rows["differences", "text, zero-shot", "sgg minus it, counterfactual"]
    assert (float(row["mean"]) if row["mean"] else None) == (
        None if np.isnan(difference.mean) else pytest.approx(difference.mean, abs=1e-5)
    )
    text = (out / "results" / "quality.md").read_text()
    for words in ("Table 1", "text, zero-shot", "SGG-IG against its baselines", "without a fault"):
        assert words in text
    with Image.open(out / "results" / "quality_sheet.png") as sheet:
        assert sheet.width > 900


def test_the_worth_of_a_part_is_that_of_the_rows_that_differ_in_it_alone(tmp_path):
    comparison = Comparison(tmp_path, [], [0, 1])
    assert comparison.worth("entity recall") == {}
    for used, system in FACTORIAL.items():
        mae, con, isa = used
        graphs = [0.3, 0.5, None] if isa else [0.4, 0.6, 0.9]  # a graph that only one of a pair has says nothing
        recall = [g if g is None else g + 0.2 * mae - 0.1 * con for g in graphs]
        seeds = [0] if used == (False, True, False) else [0, 1]  # a seed without all rows says nothing
        results = [{"counterfactual pairs": {}, "per picture": {"entity recall": [recall]}}, {"per picture": None}]
        comparison.results[system] = {seed: results[seed] for seed in seeds}
    found = comparison.worth("entity recall")
    assert {part: num for part, (_, num) in found.items()} == dict.fromkeys(PARTS, 4)
    for part, value in zip(PARTS, (0.2, -0.1, -0.1), strict=True):
        estimate, _ = found[part]
        assert [estimate.low, estimate.mean, estimate.high] == pytest.approx([value] * 3), part


def _mean(values: np.ndarray) -> float:
    seen = [v for v in values if not np.isnan(v)]
    return sum(seen) / len(seen) if seen else float("nan")
