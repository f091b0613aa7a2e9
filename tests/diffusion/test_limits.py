"""How many steps a scheduler takes is its own affair: asked by sampling one number, not by a constant of ours."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler

from sgg_fast.diffusion.limits import late_start, refusal
from sgg_fast.diffusion.sampling import sample_latents
from sgg_fast.drawing.models import _AS_SD_RUNS_IT, SCHEDULERS, SHIPPED

CONFIG = json.loads((SHIPPED / "scheduler" / "scheduler_config.json").read_text())


def made(name: str):
    import diffusers

    return getattr(diffusers, SCHEDULERS[name]).from_config(CONFIG, **_AS_SD_RUNS_IT.get(name, {}))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_most_that_is_named_works_and_more_does_not(name):
    said = refusal(made(name), 1000)
    assert said.startswith("this scheduler takes at most 99"), "1000 steps of 1000 levels with an offset of 1"
    most = int(said.split()[-1])
    scheduler = made(name)
    latents = sample_latents(
        lambda z, t: 0.5 * z, scheduler, torch.ones(1, 4, 2, 2), most, 1.0, generator=torch.Generator().manual_seed(1)
    )
    assert torch.isfinite(latents).all() and scheduler.timesteps.max() < 1000
    assert refusal(made(name), most) == "" != refusal(made(name), most + 1)
    assert refusal(made(name), 1) == "" == refusal(made(name), 100)


def test_a_schedule_of_fewer_levels_has_a_lower_limit_and_is_left_as_it_was():
    scheduler = DDIMScheduler(num_train_timesteps=50)
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    assert refusal(scheduler, 51) == "this scheduler takes at most 50" and refusal(scheduler, 50) == ""
    assert torch.equal(scheduler.timesteps, before)


def test_a_sampling_that_begins_at_half_the_noise_is_told_of():
    assert "begins at noise level 501 of 1000" in late_start(made("ddim"), 501)
    assert late_start(made("ddim"), 100) == "" == late_start(made("ddim"), 999)
