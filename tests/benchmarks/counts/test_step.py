"""Counted launches and bytes of a whole step, on its chip and by its host."""

from __future__ import annotations

import pytest
from support.cases.benchmark import SMALL_UNET
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts import model, step
from benchmarks.counts import unet as unet_counts
from benchmarks.counts.kernels import Count
from benchmarks.counts.roofline import CHIPS
from sgg_fast import recipes
from sgg_fast.config import Config
from sgg_fast.train.memory.sizes import PUBLISHED


@pytest.fixture
def small(monkeypatch) -> Config:
    """The settings of vg256 with a small UNet and graph encoder in place of the published ones."""
    config = recipes.vg256().replace(width=32, num_layers=1)
    monkeypatch.setitem(PUBLISHED, "sd", SMALL_UNET)
    monkeypatch.setitem(recipes.RECIPES, "vg256", lambda: config)
    caches = unet_counts.count, model.steps
    for cache in caches:
        cache.cache_clear()
    yield config
    for cache in caches:
        cache.cache_clear()


def test_the_host_decides_where_it_is_slower():
    work = Count(1000, 10**9)
    captured, eager = (step.StepCount(work, Count(0, 0), captured) for captured in (True, False))
    assert captured.host == step.HOST_CALLS and eager.host == 1000
    assert all(eager.seconds(chip) >= captured.seconds(chip) for chip in CHIPS)
    assert eager.seconds(CHIPS[1]) == 1000 * step.HOST


def test_pretraining_with_adam_in_fp32_moves_32_bytes_a_weight_in_its_update(small):
    """Weight and two moments read and written, the gradient read twice."""
    config = small.replace(optimizer="adam")
    found = step.count(config, "pretrain")
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = [p for p in step.stage_of(config, "pretrain").parameters() if p.requires_grad]
    assert found.update.bytes == 32 * sum(p.numel() for p in trained)
    assert found.captured and found.host == 3 < found.update.launches < found.compute.launches


def test_a_step_of_every_command(small, monkeypatch, capsys):
    """DeepSpeed's own optimiser is not counted, and its host launches each kernel."""
    names = ("--stage finetune", "--stage finetune --deepspeed ds.json")
    monkeypatch.setattr(step, "FORMS", {name: step.FORMS[name] for name in names})
    assert step.main(["--recipe", "vg256"]) == 0
    heading, ours, deepspeeds = capsys.readouterr().out.splitlines()
    assert heading == "vg256, 256 x 256, batch 2"
    assert ours.startswith("--stage finetune ") and " of them the optimiser's; " in ours
    assert ours.endswith("; 3 by the host") and "without the optimiser's" in deepspeeds
    launches = deepspeeds.split(" launches,")[0].split()[-1]
    assert deepspeeds.endswith(f"; {launches} by the host") and int(launches.replace(",", "")) > 200


def test_a_drawn_step_is_one_graph_unless_it_is_not_captured(small):
    found, plain = (step.count_sampling(small.replace(cuda_graphs=captured)) for captured in (True, False))
    assert found.captured and found.update == Count(0, 0) and found.host == 3
    assert not plain.captured and plain.host == found.compute.launches > 100


def test_what_is_written_is_what_the_model_reads(small, monkeypatch, tmp_path):
    monkeypatch.setattr(model, "STEPS", tmp_path / "steps.json")
    some = {name: make for name, make in step.written().items() if name in ("pretrain b2", "unet 256 b2")}
    monkeypatch.setattr(step, "written", lambda: some)
    step.write(model.STEPS)
    found, alone = model.steps(), step.count(small, "pretrain")
    assert found.keys() == some.keys() and found["unet 256 b2"].update == model.Work(0, 0)
    assert found["unet 256 b2"].compute.flops > 0
    written = found["pretrain b2"]
    for part, counted in ((written.compute, alone.compute), (written.update, alone.update)):
        assert (part.launches, part.bytes, part.flops) == (counted.launches, counted.bytes, counted.flops)
