"""Flags and rows of a measuring command: the words of a row, its rates, and a CSV that grows row by row."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import output
from benchmarks.harness.measure import Times
from benchmarks.harness.output import OpRow, Output, Row, columns, read_rows
from sgg_fast.config import ConfigError


def row(**changes: object) -> OpRow:
    return OpRow("geglu", "fwd", "paper", "B=2", "bf16", "ours", "replay", "warm", **changes)


def test_the_flags_of_every_measuring_command(capsys):
    parser = output.command_parser("x", "What it is.\n\nMore of it.", "x.csv")
    args = parser.parse_args(["--device", "cpu", "--out", "d"])
    assert (args.device, args.out, args.limit) == ("cpu", Path("d"), math.inf)
    assert output.device_of(args) == torch.device("cpu")
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "gpu"])
    said = capsys.readouterr().err
    assert said.startswith("python -m benchmarks.x: ") and "gpu is not cpu, cuda or cuda:NUMBER" in said
    number = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"--device cuda:{number}: there are {number} CUDA devices here"):
        output.device_of(parser.parse_args(["--device", f"cuda:{number}"]))


def test_after_the_deadline_nothing_starts(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    begun = []
    for item in output.in_time(["a", "b", "c", "d"], 1.5):
        begun.append(item)
        now[0] += 1
    assert begun == ["a", "b"]
    assert capsys.readouterr().out == "--limit is spent: 2 left out, the first of them c\n"


def test_rates_are_compulsory_bytes_over_the_median():
    """8 MB in 2 ms are 4 GB/s: half of a copy's 8."""
    found = row()
    found.set_rate(Times(1.0, 2.0, 4.0), 8_000_000, 8e9)
    assert (found.ms_p20, found.ms_p50, found.ms_p80) == (1.0, 2.0, 4.0)
    assert (found.gb_s, found.copy_gb_s, found.copy_share) == (4.0, 8.0, 0.5)
    assert "4.0 GB/s" in found.line() and found.line().endswith("50.0 % of copy")
    assert row(status="failed: no").line().endswith("failed: no")


def test_a_row_is_in_the_file_at_once_and_another_command_appends(tmp_path, capsys):
    first = Output(tmp_path / "new", "x.csv", OpRow)
    path = tmp_path / "new" / "x.csv"
    measured = row(launches=7)
    measured.set_rate(Times(0.1, 1 / 3, 0.5), 1000, 1e9)
    first.add(measured)
    assert [r["ms_p50"] for r in read_rows(path)] == ["0.333333"]
    Output(path.parent, "x.csv", OpRow, append=True).add(row(status="skipped"))
    rows = read_rows(path)
    assert [(r["op"], r["status"], r["launches"], r["error"]) for r in rows] == [
        ("geglu", "ok", "7", ""),
        ("geglu", "skipped", "", ""),
    ]
    assert list(rows[0]) == columns(OpRow) and columns(OpRow)[-len(columns(Row)) :] == columns(Row)
    assert capsys.readouterr().out.splitlines()[1].endswith("skipped")
    Output(path.parent, "x.csv", OpRow)
    assert read_rows(path) == [] == read_rows(tmp_path / "none.csv"), "without append it starts anew"
    assert len(first.rows) == 1


def test_an_error_is_one_line_and_memory_that_is_out_is_no_failure():
    assert output.failure(ValueError("out of luck\nand more")) == "failed: ValueError: out of luck"
    assert output.failure(torch.OutOfMemoryError("of 2 GiB")) == "ran out of memory: of 2 GiB"
    assert output.first_line(KeyError()) == "KeyError" and len(output.first_line(ValueError("x" * 999))) == 160
