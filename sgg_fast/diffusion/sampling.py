"""Sampling latents with classifier-free guidance from any denoiser and any diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

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
) -> torch.Tensor:
    """Latents [B, c, h, w] from unit noise of the same shape, eta 0.

    denoise(z [2B, c, h, w], t) predicts for the null condition (first half) and the condition (second
    half); with guidance 1 it is called with B and predicts for the condition alone. Eq. 2 of SGG-IG:
    `w eps(condition) + (1 - w) eps(null)`. `track` may wrap the timesteps in a progress bar.
    """
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    extra = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for t in track(scheduler.timesteps):
        z = latents if guidance == 1 else torch.cat([latents, latents])
        predicted = denoise(scheduler.scale_model_input(z, t), t)
        if guidance != 1:
            null, given = predicted.chunk(2)
            predicted = null + guidance * (given - null)
        latents = scheduler.step(predicted, t, latents, **extra).prev_sample
    return latents
