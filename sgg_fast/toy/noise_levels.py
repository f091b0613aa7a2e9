"""The error of a UNet's implied clean latents by noise level, for `gates.py` and for the log of a long training.

It is the mean square in units of their variance, over all cells, and over the cells of objects, whose faults are the
visible ones. Letters: B pictures, h, w height and width of a latent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sgg_fast.commands import NotFiniteError
from sgg_fast.diffusion import noise
from sgg_fast.eval.relations import is_ground
from sgg_fast.toy import world

BANDS = ((100, 200), (200, 400), (400, 600), (600, 800), (800, 1000))
"""Ranges of timesteps: (from, up to)."""
Predict = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""Noisy latents, timesteps and the slice of the pictures -> predicted v."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Mean squared error of the implied clean latents by band of timesteps."""

    everywhere: dict[tuple[int, int], float]
    objects: dict[tuple[int, int], float]
    """Error over the cells that show an object that is not a ground."""

    def __str__(self) -> str:
        return ", ".join(f"t {a}-{b} {self.everywhere[a, b]:.4f} (objects {self.objects[a, b]:.4f})"
                         for a, b in self.everywhere)  # fmt: skip


def object_cells(scenes: Sequence[world.Scene], side: int) -> torch.Tensor:
    """[B, side, side] share of each latent's cell that shows an object that is not a ground."""
    cells = []
    for scene in scenes:
        things = [k for k, name in enumerate(scene.graph.objects) if not is_ground(name)]
        mask_HW = scene.masks[things].any(axis=0).astype(np.float32)
        step = mask_HW.shape[0] // side
        cells.append(mask_HW.reshape(side, step, side, step).mean(axis=(1, 3)))
    return torch.from_numpy(np.stack(cells))


@torch.no_grad()
def x0_errors(
    predict: Predict, latents: torch.Tensor, abar: torch.Tensor, scenes: Sequence[world.Scene], batch: int = 64
) -> Errors:
    """Errors on scaled latents [B, 4, h, w] of `scenes`; each is noised once in each band, by a seed of its own."""
    weight = object_cells(scenes, latents.shape[-1])[:, None]
    everywhere, objects = {}, {}
    for low, high in BANDS:
        draw = torch.Generator().manual_seed(low)
        t = torch.randint(low, high, (len(latents),), generator=draw)
        eps = torch.randn(latents.shape, generator=draw)
        noisy = noise.add_noise(latents, eps, abar[t])
        rows = [slice(k, k + batch) for k in range(0, len(latents), batch)]
        predicted = torch.cat([predict(noisy[r], t[r], r) for r in rows])
        square = (noise.predicted_z0("v_prediction", predicted.float(), noisy, abar[t]) - latents).square()
        everywhere[low, high] = float(square.mean())
        objects[low, high] = float((square * weight).sum() / (weight.sum() * latents.shape[1]))
    return Errors(everywhere, objects)


@torch.no_grad()
def measure(model: str | None, data: str, num: int) -> Errors:
    """Measure a model, named as for infer.py, on the first held-out scenes.

    Raises ValueError for unusable input, `NotFiniteError` for predictions with NaN or Inf.
    """
    from sgg_fast.data.cache import to_pixels
    from sgg_fast.drawing.models import load_model

    pipeline = load_model(model).pipeline
    if (kind := pipeline.scheduler.config.prediction_type) != "v_prediction":
        raise ValueError(f"--model {model}: its UNet predicts {kind}, and the gates are of v_prediction")
    scenes = [world.draw_scene(world.HELD_OUT_SEED, i, spoken=data == "toy-words") for i in range(num)]
    pixels = to_pixels(np.stack([scene.image for scene in scenes]))
    means = torch.cat([pipeline.vae.encode(some).latent_dist.mean for some in pixels.split(50)])
    context, mask = pipeline.encode_graphs([scene.graph for scene in scenes], guided=False)

    def predict(z: torch.Tensor, t: torch.Tensor, rows: slice) -> torch.Tensor:
        return pipeline.unet(z, t, context[rows], encoder_attention_mask=mask[rows]).sample

    found = x0_errors(predict, means * pipeline.vae.config.scaling_factor, pipeline.scheduler.alphas_cumprod, scenes)
    if not all(map(math.isfinite, found.everywhere.values())):
        raise NotFiniteError(f"--model {model}: it predicts numbers that are not finite: get the model again")
    return found
