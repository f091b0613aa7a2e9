"""Numbers that go bad: poisoned steps are skipped, counted, logged; many in a row stop the run; spikes are flagged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import DS_JSON
from support.tiny_runs import lines, rows, trainer

from sgg_fast.diffusion.noise import draw_negatives
from sgg_fast.train.order import SampleOrder
from sgg_fast.train.run.checkpoint import newest_checkpoint
from sgg_fast.train.run.health import Health
from sgg_fast.train.run.interrupts import BadNumbers
from sgg_fast.train.run.log import RunLog


def poison(one, ids: set[int], value: float) -> None:
    """These samples' cached CLIP image (pre-training) or latents (fine-tuning) become `value`."""
    index = torch.tensor(sorted(ids))
    if one.stage == "pretrain":
        one.engine.module._frozen[2][index] = value
    else:
        one.cache.moments[index] = value


@pytest.mark.parametrize(("stage", "ds_path"), [("pretrain", None), ("finetune", None), ("finetune", DS_JSON)])
def test_a_poisoned_sample_costs_its_steps_only_and_is_named(tmp_path, stage, ds_path):
    settings = {f"{stage}_steps": 8, "resolution": 32, "num_scenes": 8, "checkpoint_every": 8, "num_negatives": 1}
    one = trainer(tmp_path / "poisoned", stage, ds_path, **settings)
    order = SampleOrder(8, 2, one.config.run.seed, 0, 1)
    read = [set(order.at(step).tolist()) for step in range(8)]
    if stage == "pretrain":  # which also reads other samples' images, as negatives
        for step, ids in enumerate(read):
            own = torch.from_numpy(order.at(step))
            ids |= set(
                draw_negatives(one.config.run.seed, step, own, one.config.objective.num_negatives, 8).flatten().tolist()
            )
    bad = [step + 1 for step, ids in enumerate(read) if 5 in ids]
    assert 2 <= len(bad) < 8
    poison(one, {5}, float("nan"))
    before = {name: p.detach().clone() for name, p in one.engine.module.named_parameters()}
    one.train()
    skipped = [line for line in lines(tmp_path / "poisoned" / stage) if line.get("event") == "skipped"]
    assert [line["step"] for line in skipped] == bad
    assert [line["skipped"] for line in skipped] == list(range(1, len(bad) + 1))
    assert [line["samples"] for line in skipped] == [order.at(step - 1).tolist() for step in bad]
    assert all(line["loss"] == "nan" for line in skipped)
    log = rows(tmp_path / "poisoned" / stage)
    assert sorted({*log, *bad}) == list(range(1, 9)) and not set(log) & set(bad)
    assert np.isfinite([value for row in log.values() for value in row.values()]).all()
    after = dict(one.engine.module.named_parameters())
    assert all(p.isfinite().all() for p in after.values()) and any(not p.equal(before[n]) for n, p in after.items())


def test_a_skip_that_is_told_late_names_its_own_step(tmp_path, monkeypatch):
    """As a replayed step tells it: some steps behind, the last ones when the run ends."""
    one = trainer(tmp_path, "pretrain", pretrain_steps=8, checkpoint_every=8)
    order, update, behind = SampleOrder(8, 2, one.config.run.seed, 0, 1), one.engine.update, 3
    lost = {2: 5.0, 6: 7.0}

    def late(ids_KB, step, factor):
        told = step - behind
        found = update(ids_KB, step, factor)
        return dataclasses.replace(found, applied=told not in lost, behind=behind, lost=lost.get(told))

    monkeypatch.setattr(one.engine, "update", late)
    monkeypatch.setattr(one.engine, "outstanding", lambda: [(6, lost[6])])
    one.train()
    skipped = [line for line in lines(tmp_path / "pretrain") if line.get("event") == "skipped"]
    assert [(line["step"], line["loss"]) for line in skipped] == [(3, "5.0"), (7, "7.0")]
    assert [line["samples"] for line in skipped] == [order.at(2).tolist(), order.at(6).tolist()]


def test_the_run_stops_after_so_many_in_a_row_and_keeps_the_good_checkpoint(tmp_path):
    settings = {"pretrain_steps": 50, "checkpoint_every": 2, "max_skipped": 3}
    trainer(tmp_path, "pretrain", **{**settings, "pretrain_steps": 4}).train()
    one = trainer(tmp_path, "pretrain", **settings)
    poison(one, set(range(8)), float("inf"))
    with pytest.raises(BadNumbers, match=r"in 3 steps in a row, the last at step 7 with samples \d, \d;"):
        one.train()
    skipped = [line["step"] for line in lines(tmp_path / "pretrain") if line.get("event") == "skipped"]
    assert skipped == [5, 6, 7] and sorted(rows(tmp_path / "pretrain")) == [1, 2, 3, 4]
    step, _ = newest_checkpoint(tmp_path / "pretrain")
    assert step == 6
    good = trainer(tmp_path, "pretrain", **settings)
    assert all(p.isfinite().all() for p in good.engine.module.parameters())


def test_good_steps_between_start_the_count_again(tmp_path):
    log = RunLog(tmp_path, "pretrain", 0, 100, 1)
    health = Health(log, 2)
    for step in range(1, 9, 2):
        health.skip(step, 1.0, [0])
        health.applied()
    assert health.skipped == 4
    health.skip(9, 1.0, [0])
    with pytest.raises(BadNumbers):
        health.skip(10, 1.0, [0])
    log.close()


def test_spikes_are_flagged_and_noise_is_not(tmp_path, caplog):
    rng = np.random.default_rng(0)
    log = RunLog(tmp_path, "pretrain", 0, 1000, 1)
    health = Health(log, 10)
    losses = 1 + 0.1 * rng.normal(size=300) + 2 * np.exp(-np.arange(300) / 40)  # falls as losses do
    losses[200] = 4.0
    for step, loss in enumerate(losses.tolist()):
        health.record(step, loss)
    log.close()
    spikes = [line for line in lines(tmp_path) if line.get("event") == "spike"]
    assert [(line["step"], line["loss"]) for line in spikes] == [(200, 4.0)]
    assert abs(spikes[0]["usual"] - 1) < 0.15
    assert "step 200: the loss jumped to 4, usually" in caplog.text
