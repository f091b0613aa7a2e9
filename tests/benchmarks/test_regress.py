"""The regression check: rows of one kind and one GPU, medians, ten per cent; everything else is left alone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import regress
from benchmarks.harness.output import OpRow, columns

GPU = "NVIDIA H100 80GB HBM3"


def write(path: Path, *rows: dict[str, str], names: list[str] | None = None) -> Path:
    """A CSV as the benchmarks write it; what a row leaves out is one and the same."""
    usual = {"op": "geglu", "mode": "fwd", "size": "256", "dtype": "bf16", "backend": "ours", "device": GPU}
    usual |= {"status": "ok", "ms_p50": "1.0", "commit": "abc", "date": "2026-11-25"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names or columns(OpRow), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**usual, **row} for row in rows)
    return path


def check(capsys, new: Path, old: Path, *more: str) -> tuple[int, str]:
    code = regress.main([str(new), "--against", str(old), *more])
    return code, capsys.readouterr().out


def test_a_slower_row_is_listed_and_fails_and_a_faster_one_is_not(tmp_path, capsys):
    old = write(tmp_path / "old.csv", {"op": "a"}, {"op": "b"}, {"op": "c"}, {"op": "d"})
    new = write(tmp_path / "new.csv", {"op": "a", "ms_p50": "1.25"}, {"op": "b", "ms_p50": "1.09"},
                {"op": "c", "ms_p50": "0.5"}, {"op": "d", "ms_p50": "1.5"})  # fmt: skip
    code, out = check(capsys, new, old)
    assert code == 1 and "4 new GPU rows, 4 with a committed row" in out and "2 are more than 10 % slower" in out
    listed = [line.split() for line in out.splitlines() if " ms " in line]
    assert [(words[0], words[6]) for words in listed] == [("1.50", "d"), ("1.25", "a")]
    assert check(capsys, new, old, "--more-than", "60")[0] == 0
    assert check(capsys, old, new)[0] == 1, "c was faster before"


@pytest.mark.parametrize(
    "other",
    [{"device": "NVIDIA H200"}, {"dtype": "fp32"}, {"backend": "compile"}, {"mode": "bwd"}, {"shape": "N=2"},
     {"call": "replay"}, {"l2": "flushed"}, {"size": "512"}],
)  # fmt: skip
def test_rows_of_another_kind_or_gpu_are_never_compared(tmp_path, capsys, other):
    old, new = write(tmp_path / "old.csv", {}), write(tmp_path / "new.csv", {"ms_p50": "9", **other})
    code, out = check(capsys, new, old)
    assert code == 0 and "1 new GPU rows, 0 with a committed row of the same kind and GPU" in out


@pytest.mark.parametrize("row", [{"device": "CPU, 2 threads"}, {"ms_p50": ""}, {"mode": "cold start"}])
def test_cpu_rows_rows_without_a_time_and_cold_starts_do_not_count(tmp_path, capsys, row):
    old, new = write(tmp_path / "old.csv", row), write(tmp_path / "new.csv", {"ms_p50": "9", **row})
    code, out = check(capsys, new, old)
    assert code == 0 and out.startswith("0 new GPU rows") and "none is slower" in out


def test_the_newest_of_the_old_rows_counts_whatever_file_it_is_in(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    write(results / "a.csv", {"ms_p50": "2.0", "date": "2026-12-01"})
    write(results / "b.csv", {"ms_p50": "1.0", "date": "2026-11-01"})
    (results / "curve.csv").write_text("step,loss\n1,2\n")
    assert check(capsys, write(tmp_path / "new.csv", {"ms_p50": "2.1"}), results)[0] == 0
    assert check(capsys, write(tmp_path / "new.csv", {"ms_p50": "2.3"}), results)[0] == 1


def test_steps_of_pretraining_have_columns_of_their_own(tmp_path, capsys):
    names = ["form", "sizes", "batch", "status", "ms_p50", "device", "commit", "date"]
    old = write(tmp_path / "old.csv", {"form": "ours", "batch": "2"}, names=names)
    for batch, code in (("2", 1), ("64", 0)):
        new = write(tmp_path / "new.csv", {"form": "ours", "batch": batch, "ms_p50": "3"}, names=names)
        assert check(capsys, new, old)[0] == code


def test_the_committed_results_can_be_read_and_files_that_are_none_are_named(tmp_path, capsys):
    assert regress.main([str(regress.RESULTS)]) == 0
    capsys.readouterr()
    curve = tmp_path / "curve.csv"
    curve.write_text("step,loss\n1,2\n")
    for path, reason in ((tmp_path / "none.csv", "there is no such file"), (curve, "it lacks the column commit")):
        assert regress.main([str(path)]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"regress: {path}: ") and reason in said
