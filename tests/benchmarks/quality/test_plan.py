"""The plan of `benchmarks.quality`: its rows, its budget, its folder."""

from __future__ import annotations

import dataclasses

import pytest
from support.cases.benchmark import SYSTEM, TINY

from benchmarks.quality import plan as quality_plan
from benchmarks.quality.plan import FULL, LEAST, SYSTEMS, Cell, Pretraining, Sizes, Speeds, Work

SPEEDS = Speeds(finetune_image=0.08, pretrain_graph=0.01, draw_step=0.04)


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


def test_a_folder_keeps_its_sizes_for_one_budget(tmp_path):
    assert quality_plan.stored(tmp_path, "1h") is None
    quality_plan.store(tmp_path, "1h", TINY)
    assert quality_plan.stored(tmp_path, "1h") == TINY
    with pytest.raises(ValueError, match="with --budget 1h, not 2h"):
        quality_plan.stored(tmp_path, "2h")
    text = (tmp_path / "plan.json").read_text()
    for spoiled in ("{}", text.replace("16", "0"), text.replace("16", '"16"'), text[:-9]):
        (tmp_path / "plan.json").write_text(spoiled)
        with pytest.raises(ValueError, match=r"plan\.json: cannot be read"):
            quality_plan.stored(tmp_path, "1h")


def test_a_plan_says_what_it_cuts():
    assert quality_plan.cut(FULL) == []
    assert quality_plan.cut(dataclasses.replace(FULL, num_graphs=3, draw_steps=1)) == [
        f"graphs: 3 of {FULL.num_graphs}",
        f"draw steps: 1 of {FULL.draw_steps}",
    ]
    assert dataclasses.replace(FULL, num_graphs=3).pictures == 12, "and the flipped ones, each from two noises"


def test_a_run_is_done_when_its_result_is_there_and_shares_its_pretraining(tmp_path):
    cell = Cell(SYSTEM["sgg, no attention loss"], 3)
    assert cell.folder(tmp_path) == tmp_path / "cells" / "sgg-no-attention-loss" / "seed-3"
    shared = {Pretraining(SYSTEM[name].pretraining, 3).folder(tmp_path) for name in ("sgg", cell.system.name)}
    assert shared == {tmp_path / "pretrained" / "mae-con" / "seed-3"}
    before = Pretraining(cell.system.pretraining, 3)
    for task, made in ((cell, "eval/eval.json"), (before, "pretrain/graph_encoder/config.json")):
        assert not task.done(tmp_path)
        path = task.folder(tmp_path) / made
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert task.done(tmp_path)
