"""Sampling latents with classifier-free guidance from any denoiser and any diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin


@torch.no_grad()
def sample_latents(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    num_steps: int,
    guidance: float,
    track: Callable[[torch.Tensor], Iterable[torch.Tensor]] = lambda timesteps: timesteps,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Latents [B, c, h, w] from unit noise of the same shape, eta 0.

    denoise(z [2B, c, h, w], t) predicts for the null condition (first half) and the condition (second
    half); with guidance 1 it is called with B and predicts for the condition alone. Eq. 2 of SGG-IG:
    `w eps(condition) + (1 - w) eps(null)`. `track` may wrap the timesteps in a progress bar.

    generator: for schedulers that draw noise at each step, one or one a sample. on_step(i, t, latents) is called after
    each step and returns the latents to go on with, or None to stop there.
    """
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    taken = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": 0.0} if "eta" in taken else {}
    if "generator" in taken and generator is not None:
        extra["generator"] = generator if isinstance(generator, torch.Generator) else list(generator)
    for i, t in enumerate(track(scheduler.timesteps)):
        z = latents if guidance == 1 else torch.cat([latents, latents])
        predicted = denoise(scheduler.scale_model_input(z, t), t)
        if guidance != 1:
            null, given = predicted.chunk(2)
            predicted = null + guidance * (given - null)
        latents = scheduler.step(predicted, t, latents, **extra).prev_sample
        if on_step is not None:
            kept = on_step(i, t, latents)
            if kept is None:
                break
            latents = kept
    return latents
