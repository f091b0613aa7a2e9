"""`benchmarks.optimiser_loss`: thirds of the losses beside those of the first optimiser."""

from __future__ import annotations

import pytest

from benchmarks import optimiser_loss
from benchmarks.steps import optimiser_loss as runs


def test_a_row_is_a_third_of_a_run_and_its_distance_from_the_first_optimiser(monkeypatch, capsys):
    losses = {"adam": [4.0, 2.0, 1.0, 1.0, 0.5], "adam8bit": [4.0, 3.0, 0.5, 1.5, 0.5]}
    monkeypatch.setattr(
        runs,
        "runs_of",
        lambda seed, args: ({name: seed * each[step] for name, each in losses.items()} for step in range(args.steps)),
    )
    assert optimiser_loss.main(["--optimizer", "adam", "adam8bit", "--steps", "5", "--seed", "1", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = [(words[1], words[3], words[4], *(float(words[k]) for k in (6, 8, 10))) for words in lines]
    first = [
        ("1", "1-2", "adam", 3.0, 0.0, 0.0),
        ("1", "1-2", "adam8bit", 3.5, 0.5, 0.5),
        ("1", "3-4", "adam", 1.0, 0.0, 0.0),
        ("1", "3-4", "adam8bit", 1.0, 0.5, 0.0),
        ("1", "5-5", "adam", 0.5, 0.0, 0.0),
        ("1", "5-5", "adam8bit", 0.5, 0.0, 0.0),
    ]
    assert found == first + [("2", *words, *(2 * value for value in values)) for _, *words, values in (
        (*row[:3], row[3:]) for row in first)]  # fmt: skip


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        optimiser_loss.main(["--steps", "0"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out and len(printed.err.splitlines()) == 1
    assert "--steps must be at least 1, not 0" in printed.err
