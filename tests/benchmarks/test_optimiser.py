"""`benchmarks.optimiser`: its words, and rows that are appended to those of `benchmarks.run`."""

from __future__ import annotations

from benchmarks import optimiser
from benchmarks.harness.output import OpRow, Output, read_rows


def test_rows_are_appended_to_those_that_are_there(tmp_path, capsys):
    Output(tmp_path, "bench.csv", OpRow).add(OpRow("geglu", "fwd", "paper", "", "bf16", "ours", "eager", "warm"))
    words = ["--device", "cpu", "--size", "tiny", "--backend", "foreach", "--seconds", "0", "--out", str(tmp_path)]
    assert optimiser.main(words) == 0
    rows = read_rows(tmp_path / "bench.csv")
    assert [(row["op"], row["backend"], row["status"]) for row in rows] == [
        ("geglu", "ours", "ok"),
        ("adam", "foreach", "ok"),
    ]
    assert "PREDICTION of the least time: RTX 4090" in capsys.readouterr().out


def test_its_words():
    args = optimiser.parse(["--backend", "fused"])
    assert (args.backend, args.size, args.seconds) == (["fused"], None, 0.3)
    assert "ours" in optimiser.parse([]).backend
