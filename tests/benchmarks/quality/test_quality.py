"""`benchmarks.quality`: the plan, and a tiny comparison that is stopped, goes on and tells what it found."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import (
    __main__ as quality,
)
from benchmarks.quality import (
    cells as quality_cells,
)
from benchmarks.quality import (
    plan as quality_plan,
)
from benchmarks.quality import (
    tables as quality_tables,
)
from benchmarks.quality.plan import FULL, LEAST, SYSTEMS, Cell, Pretraining, Sizes, Speeds, Work
from sgg_fast.eval import bootstrap, evaluate

SPEEDS = Speeds(finetune_image=0.08, pretrain_graph=0.01, draw_step=0.04)
TINY = Sizes(batch_size=2, pretrain_steps=2, finetune_steps=2, num_scenes=16, num_graphs=2, draw_steps=1)
SYSTEM = {system.name: system for system in SYSTEMS}


def test_the_rows_of_both_tables():
    second = [s for s in SYSTEMS if "table2" in s.tables]
    used = {((s.pretraining or (False, False)), s.settings["loss_weight"] < 1) for s in second}
    assert used == {((m, c), i) for m in (True, False) for c in (True, False) for i in (True, False)}
    first = [s.name for s in SYSTEMS if "table1" in s.tables]
    assert first == [
        "text, zero-shot",
        "text, sentence",
        "text, phrases",
        "text, numbered",
        "sgdiff",
        "sgg, no attention loss",
        "sgg",
    ]
    assert [s.name for s in SYSTEMS if len(s.tables) == 2] == ["sgg"], "what both tables have runs once"
    # 13 systems train; pre-trainings are shared by cells that differ in L_ISA alone.
    assert Work.of(list(SYSTEMS), 3) == Work(finetunings=39, pretrainings=9, evaluations=42)
    assert Work.of(quality_plan.chosen("table1"), 2) == Work(finetunings=12, pretrainings=2, evaluations=14)


@pytest.mark.parametrize("seconds", [3600, 7200, 40_000, 200_000])
def test_a_plan_takes_its_budget_or_is_the_full_one(seconds):
    work = Work.of(list(SYSTEMS), 3)
    sizes = quality_plan.fit(seconds, work, SPEEDS)
    # Written out: every image, graph, picture and run once.
    training = sizes.batch_size * (39 * sizes.finetune_steps * 0.08 + 9 * sizes.pretrain_steps * 0.01)
    drawing = 42 * 4 * sizes.num_graphs * sizes.draw_steps * 0.04
    rest = 48 * SPEEDS.run + 42 * SPEEDS.evaluation + sizes.num_scenes * SPEEDS.scene
    assert quality_plan.seconds_of(sizes, work, SPEEDS) == pytest.approx(training + drawing + rest)
    assert training + drawing + rest <= seconds * 1.001
    if sizes != FULL and sizes.num_graphs < FULL.num_graphs:
        assert training + drawing + rest > 0.9 * seconds, "the budget is used"
    assert all(getattr(sizes, f.name) <= getattr(FULL, f.name) for f in dataclasses.fields(Sizes))


def test_more_time_never_makes_a_cell_smaller_and_too_little_is_the_least():
    work = Work.of(list(SYSTEMS), 3)
    images = []
    for seconds in (600, 2000, 4000, 8000, 50_000, 1e6):
        sizes = quality_plan.fit(seconds, work, SPEEDS)
        images.append((sizes.batch_size * sizes.finetune_steps, sizes.num_graphs))
    assert images[0] == (LEAST.batch_size * LEAST.finetune_steps, LEAST.num_graphs)
    assert [i for i, _ in images] == sorted(i for i, _ in images)
    assert quality_plan.fit(1e6, work, SPEEDS) == FULL


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h", 3600), ("1.5h", 5400), ("30m", 1800), ("90s", 90), ("full", None)]
)
def test_budgets_are_read(text, seconds):
    assert quality_plan.budget_seconds(text) == seconds


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


def test_a_folder_keeps_its_sizes_and_refuses_another_budget(tmp_path, capsys):
    quality_plan.store(tmp_path, "1h", TINY)
    assert quality_plan.stored(tmp_path, "1h") == TINY
    assert quality.main(["--out", str(tmp_path), "--dry", "--seeds", "1"]) == 0, "nothing is measured anew"
    told = capsys.readouterr().out
    assert "14 cells, 14 of them to run; each: 2 + 2 steps at batch 2 on 16 scenes" in told
    assert "finetune steps: 2 of 2000" in told and "--budget full" in told
    assert quality.main(["--out", str(tmp_path), "--dry", "--budget", "2h"]) == 2
    assert "holds a comparison with --budget 1h, not 2h" in capsys.readouterr().err


class Cut(BaseException):
    """A run that is killed."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """Two cells, cut after the first had finished and while the second was evaluated; then the same command again."""
    out = tmp_path_factory.mktemp("quality")
    seen: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NUM_ACCURACY", 2)
        for module in (quality_cells, quality_tables):
            patch.setattr(module, "GRAPHS", "toy")
        small = {"width": 32, "num_layers": 1, "log_every": 1}
        patch.setattr(quality_cells, "COMMON", {**quality_cells.COMMON, **small})
        patch.setattr(quality_plan, "chosen", lambda only: [SYSTEM["text, zero-shot"], SYSTEM["sgg"]])
        quality_plan.store(out, "1h", TINY)
        words = ["--out", str(out), "--seeds", "1", "--only", "table1", "--results", str(out / "results")]
        compare = evaluate.measure_direction

        def cut(*_: object) -> None:
            raise Cut

        patch.setattr(evaluate, "measure_direction", cut)  # only SGG-IG comes by there, its pictures drawn
        with pytest.raises(Cut):
            quality.main(words)
        seen["first"] = _times(out)
        patch.setattr(evaluate, "measure_direction", compare)
        assert quality.main(words) == 0
    return out, seen


def _times(out: Path) -> dict[str, int]:
    kinds = ("*.png", "eval.json", "*.safetensors")
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for kind in kinds for p in out.rglob(kind)}


def test_a_killed_comparison_goes_on_and_redoes_nothing(compared):
    out, seen = compared
    before, after = seen["first"], _times(out)
    made = {path for path in before if "checkpoints" not in path and not path.startswith("results")}
    text, sgg = (Cell(SYSTEM[name], 0).folder(out).relative_to(out) for name in ("text, zero-shot", "sgg"))
    assert f"{text}/eval/eval.json" in made and f"{sgg}/eval/eval.json" not in made
    assert any(path.startswith(f"{sgg}/eval/pictures") for path in made), "it was cut after its pictures"
    assert any(path.startswith("pretrained/mae-con/seed-0") for path in made)
    assert {path: before[path] for path in made} == {path: after[path] for path in made}
    assert f"{sgg}/eval/eval.json" in after
    assert not list(out.glob("cells/*/*/finetune/checkpoints")), "a finished cell needs none"


def test_systems_are_judged_from_the_same_noise_and_say_how_to_repeat_them(compared):
    out, _ = compared
    cells = [Cell(SYSTEM[name], 0).folder(out) for name in ("text, zero-shot", "sgg")]
    names = [sorted(p.relative_to(c).as_posix() for p in c.glob("eval/pictures/seed-*/*.png")) for c in cells]
    assert names[0] == names[1] and {name.split("/")[2] for name in names[0]} == {"seed-0", "seed-1"}
    commands = [(c / "eval.command").read_text().split(" --data")[1] for c in cells]
    assert commands[0] == commands[1]
    told = (cells[1] / "finetune.command").read_text()
    assert "--stage finetune" in told and "--loss-weight 0.5" in told and "pretrained/mae-con/seed-0" in told
    assert "--mae-weight 1.0" in (Pretraining((True, True), 0).folder(out) / "pretrain.command").read_text()


def test_tables_hold_what_the_evaluations_wrote(compared):
    out, _ = compared
    with (out / "results" / "quality.csv").open(newline="") as file:
        rows = {(r["table"], r["system"], r["figure"]): r for r in csv.DictReader(file)}
    headlines = {}
    for name in ("text, zero-shot", "sgg"):
        result = json.loads((Cell(SYSTEM[name], 0).folder(out) / "eval" / "eval.json").read_text())
        expected = {
            "entity recall": np.nanmean(np.nanmean(np.array(result["per picture"]["entity recall"], float), axis=0)),
            "counts": result["rows"]["drawn"]["counts"],
            "diversity": np.mean(result["diversity"]["values"]),
        }
        for figure, value in expected.items():
            assert float(rows["table1", name, figure]["mean"]) == pytest.approx(value, rel=1e-4), figure
        pairs = [np.array(e["values"], float) for e in result["counterfactual pairs"].values() if e["pairs"]]
        headlines[name] = np.array([[_mean(column) for side in pairs for column in side.T]])
    difference = bootstrap.difference(headlines["sgg"], headlines["text, zero-shot"])
    row = rows["differences", "text, zero-shot", "sgg minus it, counterfactual"]
    assert (float(row["mean"]) if row["mean"] else None) == (
        None if np.isnan(difference.mean) else pytest.approx(difference.mean, abs=1e-5)
    )
    text = (out / "results" / "quality.md").read_text()
    for words in ("Table 1", "text, zero-shot", "SGG-IG against its baselines", "--budget full", "toy detector"):
        assert words in text
    with Image.open(out / "results" / "quality_sheet.png") as sheet:
        assert sheet.width > 900


def _mean(values: np.ndarray) -> float:
    seen = [v for v in values if not np.isnan(v)]
    return sum(seen) / len(seen) if seen else float("nan")


def test_a_cell_that_cannot_run_fails_alone(tmp_path):
    """Without the training set nothing can train; each cell says so and the rest is still tried."""
    cells = [Cell(SYSTEM["sgdiff"], 0), Cell(SYSTEM["text, sentence"], 0)]
    ended: list[object] = []
    failed = quality_cells.run_all(tmp_path, TINY, cells, 1, lambda task, seconds: ended.append(task))
    assert len(failed) == 2 and not ended
    assert all("there is no such folder" in line for line in failed)
