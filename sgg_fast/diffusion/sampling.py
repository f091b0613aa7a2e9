"""Samples latents with guidance from any denoiser and any diffusers scheduler.

The host never waits for the device within the loop. Schedulers index and compare timesteps on the host; the denoiser
gets them from a table that is copied to the device before the first step. (Diffusers' pipelines call DDIM with a
timestep on the device, and wait for it six times a step.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin

from sgg_fast.diffusion.noise import predicted_z0


def conditions(guidance: float, relation_guidance: float = 0.0) -> tuple[str, ...]:
    """The conditions of one denoiser call, in the order of the batch.

    "null": the null condition; "bare": the graph without its relations; "given": the condition itself, always last.
    """
    return ("null",) * (guidance != 1) + ("bare",) * (relation_guidance != 0) + ("given",)


Weight = float | torch.Tensor


def guided(
    predicted: torch.Tensor, asked: Sequence[str], guidance: Weight, relation_guidance: Weight = 0.0
) -> torch.Tensor:
    """Guided prediction [B, ..] from the predictions [k B, ..] for the `conditions`; both guidances may be tensors [].

    `null + g (given - null) + r (given - bare)`: eq. 2 of SGG-IG, and a second guidance term for the relations alone.
    """
    parts = dict(zip(asked, predicted.chunk(len(asked)), strict=True))
    given = out = parts["given"]
    if "null" in parts:
        out = torch.lerp(parts["null"], given, guidance)
    if "bare" in parts:
        out = out + relation_guidance * (given - parts["bare"])
    return out


def copied(z: torch.Tensor, num: int) -> torch.Tensor:
    """The latents [B, ..] of a denoiser's call for `num` conditions, [num B, ..]."""
    return z if num == 1 else torch.cat([z] * num)


@torch.no_grad()
def sample_latents(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    num_steps: int,
    guidance: float = 1.0,
    track: Callable[[torch.Tensor], Iterable[torch.Tensor]] = lambda timesteps: timesteps,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
    relation_guidance: float = 0.0,
    on_x0: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Latents [B, c, h, w] from unit noise of the same shape, eta 0.

    denoise(z [k B, c, h, w], t) predicts for the k `conditions` of both guidances in one call. With guidance 1 and
    relation guidance 0 that is one condition, or the denoiser guides itself (`CapturedUNet`). `track` may wrap the
    timesteps in a progress bar.

    generator: one, or one a sample, for schedulers that draw noise at each step. on_step(i, t, latents) runs after each
    step, with t on the host; it returns the latents for the next step, or None to stop. on_x0(pred_x0) runs before
    on_step with the clean latents that the step predicts.
    """
    scheduler.set_timesteps(num_steps)
    on_host: torch.Tensor = scheduler.timesteps
    on_device = on_host.to(noise.device)
    # Whole timesteps as plain integers: comparisons need no torch call. Euler and Heun require tensors.
    steps = list(on_host) if on_host.is_floating_point() else on_host.tolist()
    latents, asked = noise * scheduler.init_noise_sigma, conditions(guidance, relation_guidance)
    taken = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": 0.0} if "eta" in taken else {}
    if "generator" in taken and generator is not None:
        extra["generator"] = generator if isinstance(generator, torch.Generator) else list(generator)
    alpha_bar = scheduler.alphas_cumprod.to(noise.device)[:, None]
    for i, t in enumerate(track(on_host)):
        z = scheduler.scale_model_input(latents, steps[i])
        predicted = guided(denoise(copied(z, len(asked)), on_device[i]), asked, guidance, relation_guidance)
        latents = scheduler.step(predicted, steps[i], latents, **extra).prev_sample
        if on_x0 is not None:
            # The scheduler scales its latents to the UNet's training scale: the z_t of `predicted_z0`.
            kind, at = scheduler.config.prediction_type, alpha_bar[round(float(t))]
            on_x0(predicted_z0(kind, predicted, z, at))
        if on_step is not None:
            kept = on_step(i, t, latents)
            if kept is None:
                break
            latents = kept
    return latents
