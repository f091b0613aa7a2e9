"""Denoising error by noise level: of predictions whose error is known, and of the shipped model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgg_fast.diffusion import noise
from sgg_fast.drawing import models
from sgg_fast.toy import text_unet, world
from sgg_fast.toy.noise_levels import BANDS, measure, object_cells, x0_errors


def test_the_error_of_a_perfect_prediction_is_nothing_and_of_none_is_the_variance(foundation):
    scenes = [world.draw_scene(1, i, spoken=True) for i in range(6)]
    latents = text_unet.encode(foundation, np.stack([scene.image for scene in scenes]))
    abar = foundation.scheduler.alphas_cumprod
    true = iter([latents[rows] for _ in BANDS for rows in (slice(0, 4), slice(4, 8))])

    def perfect(z, t, rows):
        z_0, a = next(true), abar[t][:, None, None, None]
        eps = (z - a.sqrt() * z_0) / (1 - a).sqrt()
        return noise.target_of("v_prediction", z_0, eps, abar[t])

    def zero(z, t, rows):  # v that says z_0 = 0
        a = abar[t][:, None, None, None]
        return a.sqrt() / (1 - a).sqrt() * z

    found = x0_errors(perfect, latents, abar, scenes, batch=4)
    assert max([*found.everywhere.values(), *found.objects.values()]) < 1e-6
    found = x0_errors(zero, latents, abar, scenes, batch=4)
    cells = object_cells(scenes, 16)[:, None]
    assert found.everywhere[BANDS[0]] == pytest.approx(float(latents.square().mean()), rel=1e-3)
    on_objects = float((latents.square() * cells).sum() / (4 * cells.sum()))
    assert found.objects[BANDS[-1]] == pytest.approx(on_objects, rel=1e-3)
    assert "t 200-400" in str(found)


def test_cells_show_things_not_grounds():
    scene = world.draw_scene(1, 0, spoken=True)
    names = [name.split()[-1] for name in scene.graph.objects]
    things = [
        k for k, name in enumerate(names) if name not in ("sky", "grass", "sea", "sand", "snow", "leaves", "flowers")
    ]
    share = object_cells([scene], 16)[0]
    assert float(share.mean()) == pytest.approx(scene.masks[things].any(axis=0).mean(), abs=1e-6)
    assert 0 < len(things) < len(names)


def test_the_shipped_model_denoises_and_the_harder_the_noisier():
    found = measure("toy", "toy", 8)
    errors = [found.everywhere[band] for band in BANDS]
    assert errors == sorted(errors) and errors[0] < 0.1 and errors[-1] < 1, "latents have unit variance"
    assert all(found.objects[band] > found.everywhere[band] for band in BANDS[:-1]), "grounds are easier"


def test_another_prediction_and_numbers_that_are_not_finite_are_no_figure(monkeypatch):
    model = models.load_model("toy")
    monkeypatch.setattr(models, "load_model", lambda name: model)
    with torch.no_grad():
        model.pipeline.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(ArithmeticError, match="--model toy: it predicts numbers that are not finite"):
        measure("toy", "toy", 1)
    model.pipeline.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="--model toy: its UNet predicts epsilon, and the gates are of v_prediction"):
        measure("toy", "toy", 1)
