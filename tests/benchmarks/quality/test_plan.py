"""The plan of `benchmarks.quality`: its rows, its budget, its folder."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from support.cases.benchmark import SYSTEM, TINY

from benchmarks.quality import plan as quality_plan
from benchmarks.quality.plan import FULL, LEAST, SYSTEMS, Cell, Pretraining, Sizes, Speeds, Work
from sgg_fast.recipes import recipe

SPEEDS = Speeds(finetune_image=0.08, pretrain_graph=0.01, draw_step=0.04)


def test_the_rows_of_both_tables():
    used = set()
    for system in quality_plan.chosen("table2"):
        before = system.pretraining
        parts = (False, False) if before is None else tuple(f"{n}_weight" not in before for n in ("mae", "con"))
        used.add((*parts, "loss_weight" not in system.settings))
    assert used == set(itertools.product((True, False), repeat=3))
    assert [s.name for s in quality_plan.chosen("table1")] == ["text, zero-shot", "text, phrases", "sgdiff", "sgg"]
    everywhere = [s.name for s in SYSTEMS if s.tables == quality_plan.TABLES]
    assert everywhere == ["sgg"], "what several tables have runs once"
    # 20 systems train. Pre-trainings are shared by cells that differ in fine-tuning alone: whole, without the
    # auto-encoder, without L_con, and without negatives, geometry (twice), gate and codes.
    assert Work.of(list(SYSTEMS), 3) == Work(finetunings=60, pretrainings=21, evaluations=63)
    assert Work.of(quality_plan.chosen("table1"), 2) == Work(finetunings=6, pretrainings=2, evaluations=8)


def test_every_system_is_a_run_that_train_py_takes():
    """Baselines have the losses about boxes in Table 4 alone, as far as they have what those train."""
    boxes = {}
    for system in SYSTEMS:
        recipe("toy-words", **quality_plan.COMMON | (system.pretraining or {}))
        config = recipe("toy-words", **quality_plan.COMMON | system.settings)
        boxes[system.name] = config.objective.geometry, config.objective.attention_loss
    whole = boxes["sgg"]
    assert min(whole) > 0 and boxes["sgg, no box losses"] == boxes["text, phrases"] == boxes["sgdiff"] == (0, 0)
    assert boxes["sgdiff, box losses"] == whole and boxes["text, phrases, box losses"] == (0, whole[1])


@pytest.mark.parametrize("seconds", [3600, 7200, 40_000, 200_000])
def test_a_plan_takes_its_budget_or_is_the_full_one(seconds):
    work = Work.of(list(SYSTEMS), 3)
    sizes = quality_plan.fit(seconds, work, SPEEDS)
    # Written out: every image, graph, picture and run once.
    training = sizes.batch_size * (60 * sizes.finetune_steps * 0.08 + 21 * sizes.pretrain_steps * 0.01)
    drawing = 63 * 4 * sizes.num_graphs * sizes.draw_steps * 0.04
    rest = 81 * SPEEDS.run + 63 * SPEEDS.evaluation + sizes.num_scenes * SPEEDS.scene
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
    given = {"model": "runs/foundation", "precision": "auto"}
    assert quality_plan.stored(tmp_path, "1h", given) is None
    quality_plan.store(tmp_path, "1h", TINY, given)
    assert quality_plan.stored(tmp_path, "1h", given) == TINY and quality_plan.notes(tmp_path) == []
    with pytest.raises(ValueError, match="with --budget '1h', not '2h'"):
        quality_plan.stored(tmp_path, "2h", given)
    with pytest.raises(ValueError, match="with --model 'runs/foundation', not 'runs/other'"):
        quality_plan.stored(tmp_path, "1h", {**given, "model": "runs/other"})
    with pytest.raises(ValueError, match="with --precision 'auto', not 'bf16'"):
        quality_plan.stored(tmp_path, "1h", {**given, "precision": "bf16"})
    text = (tmp_path / "plan.json").read_text()
    noted = text.replace('"budget"', '"notes": "one", "budget"')
    wrong = noted, noted.replace('"one"', "[1]"), text.replace("16", "0"), text.replace("16", '"16"')
    for spoiled in ("{}", *wrong, text[:-9]):
        (tmp_path / "plan.json").write_text(spoiled)
        with pytest.raises(ValueError, match=r"plan\.json: cannot be read"):
            quality_plan.stored(tmp_path, "1h", given)


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
    before, others = Pretraining.of(cell), [Cell(SYSTEM[name], 3) for name in ("sgg", "sgg, no geometry")]
    folders = [task.folder(tmp_path) for task in (before, *map(Pretraining.of, others))]
    assert folders[0] == folders[1] == tmp_path / "pretrained" / "whole" / "seed-3"
    assert folders[2] == tmp_path / "pretrained" / "geometry-0-0" / "seed-3"
    assert Pretraining.of(Cell(SYSTEM["sgdiff"], 3)) is None
    for task, made in ((cell, "eval/eval.json"), (before, "pretrain/graph_encoder/config.json")):
        assert not task.done(tmp_path)
        path = task.folder(tmp_path) / made
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert task.done(tmp_path)
