"""`benchmarks.cpu`: forms run in turn, the last is what others are compared with, and a mismatch has no number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import cpu
from benchmarks.steps import cpu as measured
from benchmarks.steps import finetune, sampling


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Names of the forms that ran; "slow" takes twice as long as "fast"."""
    clock, calls = SimpleNamespace(now=0.0), []

    def form(name: str, seconds: float):
        def run():
            calls.append(name)
            clock.now += seconds

        return run

    monkeypatch.setattr(measured.time, "process_time", lambda: clock.now)
    forms = {"slow, 64x64 b1": (form("slow", 0.2), ""), "wrong, 64x64 b1": (form("wrong", 0.2), "off by 1"),
             "fast, 64x64 b1": (form("fast", 0.1), "")}  # fmt: skip
    monkeypatch.setattr(measured, "draw_forms", lambda: forms)
    return calls


def test_forms_run_in_turn_and_a_wrong_one_gets_no_number(called, tmp_path, capsys):
    assert cpu.main(["--what", "draw", "--rounds", "3", "--out", str(tmp_path)]) == 1
    assert called == ["slow", "wrong", "fast"] * 4, "the first round warms up"
    printed = capsys.readouterr().out.splitlines()
    assert "2.00 of diffusers'" in printed[1] and printed[2].endswith("mismatch: off by 1")
    header, slow, wrong, _ = (line.split(",") for line in (tmp_path / "toy_cpu.csv").read_text().splitlines())
    assert dict(zip(header, slow, strict=False))["ms_p50"] == "200"
    assert dict(zip(header, wrong, strict=False))["ms_p50"] == ""


@pytest.mark.slow
def test_both_sides_do_what_they_should():
    forms = {**measured.finetune_forms(), **measured.draw_forms()}
    assert [name for name, (_, fault) in forms.items() if fault] == []
    assert len(forms) == 5


@pytest.fixture
def small(monkeypatch):
    """The toy at an eighth of its pixels and a step's losses."""
    known = measured.recipe
    small = {"resolution": 32, "batch_size": 1, "width": 32, "num_layers": 1}
    monkeypatch.setattr(measured, "recipe", lambda name, **settings: known(name, **small, **settings))
    monkeypatch.setattr(finetune, "NUM_LOSSES", 1)


def test_the_forms_of_a_step_match_on_graphs_of_the_toys_largest_size(small):
    forms = measured.finetune_forms()
    assert list(forms) == ["ours, 32x32 b1", "diffusers adamw-fused, 32x32 b1", "diffusers adamw, 32x32 b1"]
    assert [fault for _, fault in forms.values()] == ["", "", ""]
    stage = forms["ours, 32x32 b1"][0].__self__.stage
    objects, relations = measured.LARGEST_GRAPH
    assert set(map(tuple, stage.cache.graphs.sizes.tolist())) == {(objects + 1, relations + objects)}


def test_the_forms_of_a_picture_match_and_draw_it(monkeypatch):
    monkeypatch.setattr(measured, "NUM_STEPS", 1)
    monkeypatch.setattr(sampling, "CHECK_STEPS", 1)
    forms = measured.draw_forms()
    assert [name.split(",")[0] for name in forms] == ["ours", "diffusers"]
    assert [fault for _, fault in forms.values()] == ["", ""]
    ours, stock = (call() for call, _ in forms.values())
    assert abs(ours - stock).max() < 0.01
