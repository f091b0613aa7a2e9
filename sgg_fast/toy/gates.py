"""Denoising error of a UNet by noise level, to watch a long training before its pictures are useful.

    python -m sgg_fast.toy.gates --model toy --data toy           # the model that ships
    python -m sgg_fast.toy.gates --model RUN --data toy-words

The error is the mean square of the clean latents that the prediction implies, in units of their variance. It is taken
over all cells, and over the cells of objects, whose faults are the visible ones. Letters: B pictures, h, w height and
width of a latent.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sgg_fast.commands import NotFiniteError, command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.diffusion import noise
from sgg_fast.toy import layout, world

BANDS = ((100, 200), (200, 400), (400, 600), (600, 800), (800, 1000))
"""Ranges of timesteps: (from, up to)."""
_GROUNDS = {name for grounds in layout.BACKDROPS.values() for name in grounds} | set(layout.COVERS)

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
        things = [k for k, name in enumerate(scene.graph.objects) if name.split()[-1] not in _GROUNDS]
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
    pixels = to_pixels(np.stack([scene.image for scene in scenes]), torch.device("cpu"))
    means = torch.cat([pipeline.vae.encode(some).latent_dist.mean for some in pixels.split(50)])
    context, mask = pipeline.encode_graphs([scene.graph for scene in scenes], guided=False)

    def predict(z: torch.Tensor, t: torch.Tensor, rows: slice) -> torch.Tensor:
        return pipeline.unet(z, t, context[rows], encoder_attention_mask=mask[rows]).sample

    found = x0_errors(predict, means * pipeline.vae.config.scaling_factor, pipeline.scheduler.alphas_cumprod, scenes)
    if not all(map(math.isfinite, found.everywhere.values())):
        raise NotFiniteError(f"--model {model}: it predicts numbers that are not finite: get the model again")
    return found


@command("toy.gates")
def main(argv: list[str] | None) -> None:
    """Exit code 0, 2 for a model or settings that cannot be used, 3 for numbers that are not finite."""
    from sgg_fast.quiet import quiet_libraries

    parser = OneLineParser(prog="python -m sgg_fast.toy.gates", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", help="a run, a pipeline folder or toy, as infer.py takes it")
    parser.add_argument("--data", default="toy", choices=("toy", "toy-words"), help="held-out scenes (%(default)s)")
    parser.add_argument("--num", type=int, default=128, help="scenes (%(default)s)")
    args = parser.parse_args(argv)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, not {args.num}")
    quiet_libraries()
    print(f"x0 error: {measure(args.model, args.data, args.num)}")


if __name__ == "__main__":
    sys.exit(main())
