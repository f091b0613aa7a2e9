"""`benchmarks.quality`: its words, its plan in words, and the page that it writes."""

from __future__ import annotations

import json

import pytest
from support.cases.benchmark import TINY

from benchmarks.quality import (
    __main__ as quality,
)
from benchmarks.quality import (
    plan as quality_plan,
)
from benchmarks.quality import (
    tables as quality_tables,
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "soon"], "--budget soon: say it as 1h"),
        (["--budget", "0h"], "--budget 0h: say it as 1h"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, capsys, words, message):
    assert quality.main([*words, "--dry", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_a_foundation_with_a_graph_encoder_is_refused(tmp_path, capsys):
    (tmp_path / "graph_encoder").mkdir()
    assert quality.main(["--dry", "--out", str(tmp_path / "out"), "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "has a graph_encoder" in error[0] and "give a copy without it" in error[0]
    quality_plan.store(tmp_path / "out", "1h", TINY, {"model": str(tmp_path), "precision": "auto"})
    (tmp_path / "graph_encoder").rmdir()
    assert quality.main(["--dry", "--out", str(tmp_path / "out"), "--model", str(tmp_path)]) == 0


def test_a_folder_keeps_its_sizes_and_refuses_another_budget(tmp_path, capsys):
    given = {"model": "", "precision": "auto"}
    quality_plan.store(tmp_path, "1h", TINY, given)
    assert quality_plan.stored(tmp_path, "1h", given) == TINY
    assert quality.main(["--out", str(tmp_path), "--dry", "--seeds", "1"]) == 0, "nothing is measured anew"
    told = capsys.readouterr().out
    assert "21 cells, 21 of them to run; each: 2 + 2 steps at batch 2 on 16 scenes" in told
    assert "finetune steps: 2 of 1500" in told and "--budget full" in told
    assert quality.main(["--out", str(tmp_path), "--dry", "--budget", "2h"]) == 2
    assert "holds a comparison with --budget '1h', not '2h'" in capsys.readouterr().err


def test_the_page_says_what_was_run_and_what_was_cut(compared):
    out, _ = compared
    text = (out / "results" / "quality.md").read_text()
    assert "Each cell: 2 + 2 steps at batch 2 on 16 scenes; 2 graphs and their pairs x 2 noises" in text
    assert "python -m benchmarks.quality --budget full --seeds 5 --jobs 1 --only table1 --out runs/quality-full" in text
    assert "finetune steps: 2 of 1500" in text


def test_a_report_shows_what_is_finished_and_runs_nothing(compared, tmp_path, capsys, monkeypatch):
    out, _ = compared
    plan = json.loads((out / "plan.json").read_text())
    monkeypatch.setattr(quality_tables, "GRAPHS", "toy-words")
    monkeypatch.setattr(quality, "run", None)
    model, results = plan["given"]["model"], str(tmp_path / "results")
    words = ["--report", "--model", model, "--seeds", "2", "--results", results]
    noted = tmp_path / "noted"  # the folder of the cells belongs to other tests, too
    noted.mkdir()
    (noted / "cells").symlink_to(out / "cells")
    (noted / "plan.json").write_text(json.dumps({**plan, "notes": ["One row is from another machine."]}))
    assert quality.main([*words, "--out", str(noted)]) == 0
    text = capsys.readouterr().out
    assert "--seeds 2 --precision auto --report`" in text and "No finished cell: `text, phrases`, `sgdiff`" in text
    assert "## Table 1" in text and "| sgg | 1 |" in text and "## Table 2" not in text
    assert "\n\nOne row is from another machine.\n\n" in text
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {"quality.md", "quality.csv"}
    assert quality.main([*words, "--out", str(tmp_path / "none")]) == 2
    assert "no finished cell of these seeds" in capsys.readouterr().err
