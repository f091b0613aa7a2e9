"""benchmarks.steps.curves draws what a run logged; a log with wrong content is one line, and its cure cures it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks.steps import curves

NAMES = [end for panel in curves.PANELS.values() for name in panel for end in (name, name + curves.CHANCE)]


def row(step: object, **changes: object) -> str:
    return json.dumps({"event": "validation", "step": step, **dict.fromkeys(NAMES, 0.5), **changes})


def log(folder: Path, *lines: str) -> Path:
    path = folder / "log.jsonl"
    path.write_text("\n".join(['{"event": "start", "step": 0}', row(1), *lines, row(2), '{"step": 3, "lo']))
    return path


def test_validations_become_a_csv_in_which_a_cut_line_is_left_out(tmp_path):
    assert curves.main([str(log(tmp_path)), "--out", str(tmp_path)]) == 0
    with (tmp_path / "curves.csv").open(newline="") as file:
        assert [(line["step"], line["masked_object"]) for line in csv.DictReader(file)] == [("1", "0.5"), ("2", "0.5")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "line 3 has no whole number as its step: delete the line"),
        ("3", "line 3 has no whole number as its step: delete the line"),
        (row("1"), "line 3 has no whole number as its step: delete the line"),
        (row(1, masked_object="0.5"), "line 3: masked_object is not a number: delete the line"),
        (row(1, more=None), "line 3: more is not a number: delete the line"),
        (row(1, more=1.0), "line 3: other figures than the first validation: delete the line"),
        ('{"event": "validation", "step": 1}', " is not a number: delete the line"),
        ('{"event": [1], "step": "x"}', "line 3 has no whole number as its step: delete the line"),
    ],
)
def test_wrong_content_is_one_line_and_the_cure_it_names_cures(tmp_path, capsys, line, reason):
    path = log(tmp_path, line)
    assert curves.main([str(path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"curves: {path}: ") and said.count("\n") == 1 and reason in said
    path.write_text(path.read_text().replace(f"{line}\n", "", 1))
    assert curves.main([str(path), "--out", str(tmp_path)]) == 0


def test_a_log_without_validations_is_one_line(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    assert curves.main([str(tmp_path / "log.jsonl"), "--out", str(tmp_path)]) == 2
    assert "no validations in it; train with --validate-every" in capsys.readouterr().err
