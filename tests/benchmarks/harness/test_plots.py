"""Bar charts of a CSV: a picture for each op, a panel for each size, a bar for each row."""

from __future__ import annotations

import importlib.util

import pytest
from PIL import Image

from benchmarks.harness import plots
from benchmarks.harness.measure import Times
from benchmarks.harness.output import OpRow, Output, read_rows


@pytest.fixture
def path(tmp_path):
    """Rows of two ops: one in two sizes, one without a number."""
    output = Output(tmp_path, "bench.csv", OpRow)
    for op, size, backend, ms in (("geglu", "paper", "ours", 1.0), ("geglu", "paper", "eager", 2.0),
                                  ("geglu", "512px", "ours", 4.0), ("pack", "paper", "ours", None)):  # fmt: skip
        row = OpRow(op, "fwd", size, "B=2", "bf16", backend, "eager", "warm")
        if ms is not None:
            row.set_rate(Times(0.5 * ms, ms, 3 * ms), 1000, 1e9)
        output.add(row)
    return tmp_path / "bench.csv"


def test_an_op_is_a_picture_and_a_size_a_panel(path):
    pytest.importorskip("matplotlib")
    (made,) = plots.draw(path, path.parent)
    assert made.name == "bench_geglu.png"
    with Image.open(made) as picture:
        assert picture.size == (704, 396), "two panels of 3.2 inches by 3.6, 110 dots an inch"


def test_bars_are_medians_with_whiskers_from_p20_to_p80(path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    panel = figure.subplots()
    plots._panel(panel, [row for row in read_rows(path) if row["size"] == "paper" and row["op"] == "geglu"], "paper")
    assert [bar.get_height() for bar in panel.patches] == [1.0, 2.0]
    whiskers = [segment[:, 1].tolist() for lines in panel.collections for segment in lines.get_segments()]
    assert whiskers == [[0.5, 3.0], [1.0, 6.0]]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["ours", "eager"]


def test_replays_of_a_gpu_hide_its_calls():
    calls = [{"call": "eager", "l2": "warm"}, {"call": "eager", "l2": "flushed"}]
    replays = [{"call": "replay", "l2": "warm"}, {"call": "replay", "l2": "flushed"}]
    assert plots.best_view(calls + replays) == replays[1:] and plots.best_view(calls) == calls


def test_without_matplotlib_there_is_a_notice_and_no_picture(path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plots.draw(path, path.parent) == []
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert plots.draw(path.with_name("none.csv"), path.parent) == []
    assert not list(path.parent.glob("*.png"))
