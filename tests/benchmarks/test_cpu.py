"""`benchmarks.cpu`: its words, and what it refuses."""

from __future__ import annotations

import contextlib

from benchmarks import cpu


def test_no_rounds_are_refused(capsys):
    with contextlib.suppress(SystemExit):
        assert cpu.main(["--rounds", "0"]) == 2
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err


def test_its_words():
    args = cpu.parse(["--what", "draw", "--rounds", "3"])
    assert (args.what, args.rounds, args.out) == (["draw"], 3, None)
    assert cpu.parse([]).what == ["finetune", "draw"]
