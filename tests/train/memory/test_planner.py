"""The memory planner: its count of a step against real tensors and resident memory, the largest batch, the moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import DS_JSON
from support.memory_child import rise, write_sizes
from support.sd_folder import write_clip, write_pairs, write_sd
from support.tiny_runs import lines, toy, train

from sgg_fast.recipes import recipe
from sgg_fast.train.backward.aside import HELD_BYTES
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.meter import Meter
from sgg_fast.train.memory.parts import (
    CUBLAS_WORKSPACE,
)
from sgg_fast.train.memory.plan import GIB, OUTSIDE, MemoryPlan
from sgg_fast.train.memory.planner import Planner, whole_step
from sgg_fast.train.stages import FinetuneStage

CPU = torch.device("cpu")


def test_a_step_ends_its_gradients_after_the_update():
    events = [("a", 8), ("b", 4), ("a", -1), ("gradient", 2), ("b", -1)]
    assert whole_step(events, [("update", 7), ("update", -1)]) == [
        ("a", 8), ("b", 4), ("a", -1), ("gradient", 2), ("update", 7), ("update", -1), ("b", -1), ("gradient", -1)
    ]  # fmt: skip


def test_a_gpu_has_frozen_models_for_a_sheet_only_unless_a_step_calls_them():
    """Their bytes move from the sheet to what is always there; a CPU has them always and plans no sheet."""
    config = toy()
    plan = Planner(config).plan(1)
    visiting = plan.moments["sample sheet"]["frozen models for a sheet"]
    assert visiting > 0 and plan.resident["frozen models"] == 0
    called = Planner(config.replace(image_embedding="predicted")).plan(1)
    assert called.resident["frozen models"] == visiting
    assert called.moments["sample sheet"]["frozen models for a sheet"] == 0
    on_cpu = Planner(config, device="cpu").plan(1)
    assert "sample sheet" not in on_cpu.moments and on_cpu.resident["frozen models"] > visiting
    assert "sample sheet" not in Planner(config.replace(sample_every=0)).plan(1).moments


def test_weight_gradients_aside_hold_their_inputs():
    inline, aside = (
        Planner(toy(max_grad_norm=0.0, weight_gradients=where)).plan(1).resident for where in ("inline", "aside")
    )
    assert aside == {**inline, "held for weight gradients aside": HELD_BYTES + CUBLAS_WORKSPACE}


def test_a_set_that_is_not_prepared_is_encoded_on_the_gpu_first():
    """128 pictures at once need more than the toy's step on one."""
    planners = {stored: Planner(toy(), num_images=8, stored=stored) for stored in (False, True)}
    raw, prepared = (planner.plan(1) for planner in planners.values())
    foundation = planners[False].foundation
    held = sum(t.nbytes for model in (foundation.clip, foundation.vae) for t in model.state_dict().values())
    assert raw.when == "encoding the set" and raw.peak > held + 128 * 64**2 * 3 * 4 and raw.reserved > raw.peak
    del raw.moments["encoding the set"]
    assert raw.moments == prepared.moments and raw.resident == prepared.resident


OPTIONS = {"image_embedding": "latent", "geometry": 0.5, "instance_codes": True, "relation_dropout": 0.1}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, OPTIONS])
def test_fake_tensors_take_what_real_ones_take(changes):
    config = toy(**changes)
    planner = Planner(config, device="cpu")
    planned = planner._trace(2).peaks
    foundation = blank_foundation(config.model)
    graph_encoder, cache = blank_conditioner(config.model, foundation), blank_cache(config, foundation, 1)
    stage = FinetuneStage(config, graph_encoder, foundation, cache)
    if config.model.gradient_checkpointing:
        foundation.unet.enable_gradient_checkpointing()
    with Meter() as meter:
        meter.keep_gradients([p for p in stage.parameters() if p.requires_grad])
        meter.phase = "forward"
        total = stage(np.zeros(2, np.int64), 0).total
        meter.phase = "backward"
        total.backward()
    for phase in ("forward", "backward"):
        assert sum(planned[phase].values()) == pytest.approx(sum(meter.peaks[phase].values()), rel=0.01)


def check_resident(folder, channels, settings, ds_path=None):
    """Planned peak against the rise of a fresh process's resident memory, within 15 %."""
    write_sizes(folder, channels)
    config = recipe("vg128", **settings, model=str(folder))
    planner = Planner(config, plan_engine(config.optim, "finetune", CPU, ds_path), "cpu", num_images=8, stored=False)
    measured = rise(folder, settings, ds_path)
    planned = planner.plan(config.optim.batch_size)
    print(f"\nplanned {planned.peak / GIB:.3f} GiB in {planned.when}, measured {measured / GIB:.3f}")
    assert planned.peak == pytest.approx(measured, rel=0.15)
    return planned


def test_plan_is_the_rise_of_resident_memory(tmp_path):
    assert check_resident(tmp_path / "m", (64, 128, 256, 256), {"batch_size": 4}).when == "update"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "settings", "ds"),
    [
        ((128, 256, 512, 512), {"batch_size": 2}, None),
        ((64, 128, 256, 256), {"batch_size": 16}, None),
        ((64, 128, 256, 256), {"batch_size": 4, "weights": "lean"}, None),
        ((64, 128, 256, 256), {"batch_size": 4}, DS_JSON),
        ((64, 128, 256, 256), {"batch_size": 4, "optimizer": "adam", "ema": 0.999, "accumulation_steps": 2}, None),
    ],
)
def test_plan_is_the_rise_of_resident_memory_in_every_mode(tmp_path, channels, settings, ds):
    check_resident(tmp_path / "m", channels, settings, ds)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 17, 100, 4096])
@pytest.mark.parametrize("lines", [[(900, 1)], [(500, 0), (0, 7)], [(50, 1), (20, 4), (-400, 9)]])
def test_largest_batch_is_found_for_every_convex_peak(monkeypatch, most, lines):
    """A peak is the highest of some straight lines (phases); with few looks, for each costs a trace."""

    def peak(batch):
        return max(a + b * batch for a, b in lines)

    looked = set()

    def plan(self, batch, budget):
        looked.add(batch)
        return MemoryPlan("", {"all": peak(batch)}, {"forward": {}}, {})

    monkeypatch.setattr(Planner, "plan", plan)
    budget = OUTSIDE + (peak(most) if most else peak(1) - 1)
    flat = peak(most + 1) == peak(most)  # then more than `most` fit
    found = Planner.__new__(Planner).largest_batch(budget)
    assert found >= most if flat else found == most
    assert peak(found or 1) + OUTSIDE <= budget or not found
    assert len(looked) <= (32 if flat else 8)


def test_checkpointing_is_planned_under_autocast_as_well():
    """Its recomputation is in backward, outside of the forward's autocast."""
    plain, recomputed = (Planner(toy(gradient_checkpointing=on)).plan(16) for on in (False, True))
    at_peak = [
        max(plan.moments[phase].get("activations", 0) for phase in ("forward", "backward"))
        for plan in (recomputed, plain)
    ]
    assert 0 < at_peak[0] < at_peak[1]


def test_the_log_has_planned_beside_measured(tmp_path):
    settings = {
        "model": str(write_sd(tmp_path / "sd")),
        "clip": str(write_clip(tmp_path / "clip")),
        "data": str(write_pairs(tmp_path / "pairs")),
        "token_init": "none",
        "geometry": 0.0,
        "attention_loss": 0.0,
        "finetune_steps": 1,
    }
    train(tmp_path / "run", "finetune", **settings)
    row = next(line for line in lines(tmp_path / "run" / "finetune") if "event" not in line)
    assert 0 < row["planned_memory_gib"] < row["peak_memory_gib"]  # the process itself is in what was measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "batch", "most"), [("adam8bit", 2, 11.7), ("adam4bit", 2, 9.3), ("adafactor", 1, 6.0)]
)
def test_the_whole_of_sdxl_at_1024_fits_a_small_card(optimizer, batch, most):
    """GiB allocated by laion1024-sdxl, without the tables of its set."""
    planner = Planner(recipe("laion1024-sdxl", optimizer=optimizer), num_images=8, stored=False)
    plan = planner.plan(batch)
    print("\n".join(plan.lines()))
    assert plan.peak <= most * GIB, plan.lines()
