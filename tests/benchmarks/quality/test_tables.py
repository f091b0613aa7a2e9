"""The tables of `benchmarks.quality`, from the evaluations of its cells."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from support.cases.benchmark import SYSTEM

from benchmarks.quality.plan import Cell
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


def _mean(values: np.ndarray) -> float:
    seen = [v for v in values if not np.isnan(v)]
    return sum(seen) / len(seen) if seen else float("nan")
