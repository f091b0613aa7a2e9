"""`benchmarks.run`: every op in every form that runs here, with a whole row for each."""

from __future__ import annotations

import pytest

from benchmarks import run
from benchmarks.harness.output import OpRow, columns, read_rows
from benchmarks.ops import cases


def test_csv_has_every_column_and_never_times_the_interpreter(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ["--quick", "--size", "tiny", "--width", "16", "--device", "cpu", "--compile-seconds", "0"]
    assert run.main([*words, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "bench.csv")
    assert list(rows[0]) == columns(OpRow)
    assert {row["op"] for row in rows} == set(cases.OPS)
    assert {row["backend"] for row in rows} == {"reference", "eager", "compile", "pyg", "sg2im"}
    for row in rows:
        facts = ("shape", "dtype", "device", "cpu", "torch", "triton", "commit", "date", "status")
        assert all(row[name] for name in facts)
        assert row["device"].startswith("CPU")
        if row["status"] == "ok":
            assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
            assert float(row["copy_share"]) == pytest.approx(float(row["gb_s"]) / float(row["copy_gb_s"]), rel=1e-4)
            assert int(row["launches"]) > 0
        else:
            assert not row["ms_p50"]
    printed = capsys.readouterr().out
    assert "CPU rows" in printed and "PREDICTION" in printed and "not a measurement" in printed
