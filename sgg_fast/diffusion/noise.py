"""The forward process q(z_t | z_0) and its inverse, on a diffusers scheduler's table of alpha_bar.

Every draw is a hash of (seed, step, sample) by `sgg_fast.ops.hash_normal` and related functions. The step may be a
device tensor [1], so that a captured step reads its current value.
"""

from __future__ import annotations

import torch

from sgg_fast import ops

# Words of the hash keys: different uses draw different numbers.
STREAM_POSTERIOR, STREAM_NOISE, STREAM_TIME, STREAM_DROP, STREAM_NEGATIVE = 11, 12, 13, 14, 15
STREAM_BARE, STREAM_GRAPH_NEGATIVE = 16, 17


def draw_timesteps(seed: int, step: int | torch.Tensor, sample_B: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """[B] int64 uniform in 0..num_timesteps-1."""
    uniform = ops.hash_uniform(seed, step, sample_B, STREAM_TIME)
    return (uniform * num_timesteps).long().clamp(max=num_timesteps - 1)


def draw_share(
    seed: int, step: int | torch.Tensor, sample_B: torch.Tensor, probability: float, stream: int
) -> torch.Tensor:
    """[B] bool, True with `probability`: images without condition (STREAM_DROP) or without relations (STREAM_BARE)."""
    return ops.hash_uniform(seed, step, sample_B, stream) < probability


def draw_negatives(
    seed: int, step: int | torch.Tensor, sample_B: torch.Tensor, num_negatives: int, num_images: int
) -> torch.Tensor:
    """[B, K] int64: images of the set other than the sample's own, uniform."""
    k = torch.arange(num_negatives, device=sample_B.device)
    drawn = ops.hash_u32(seed, step, sample_B[:, None], STREAM_NEGATIVE, k) % (num_images - 1)
    return drawn + (drawn >= sample_B[:, None])


def _column(alpha_bar_B: torch.Tensor) -> torch.Tensor:
    return alpha_bar_B[:, None, None, None]


def add_noise(z_0: torch.Tensor, noise: torch.Tensor, alpha_bar_B: torch.Tensor) -> torch.Tensor:
    """`sqrt(abar) z_0 + sqrt(1 - abar) noise`, [B, c, h, w]."""
    a = _column(alpha_bar_B)
    return a.sqrt() * z_0 + (1 - a).sqrt() * noise


def target_of(prediction_type: str, z_0: torch.Tensor, noise: torch.Tensor, alpha_bar_B: torch.Tensor) -> torch.Tensor:
    """Target of the UNet: the noise, or v (Salimans and Ho, 2022)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = _column(alpha_bar_B)
        return a.sqrt() * noise - (1 - a).sqrt() * z_0
    raise ValueError(f"prediction_type {prediction_type!r} of the scheduler is not supported (epsilon, v_prediction)")


def predicted_z0(
    prediction_type: str, predicted: torch.Tensor, z_t: torch.Tensor, alpha_bar_B: torch.Tensor
) -> torch.Tensor:
    """The clean latent that the prediction implies, [B, c, h, w].

    At abar = 0 z_t is all noise, and predicted noise does not determine z_0: it is 0 there, the mean of latents.
    """
    a = _column(alpha_bar_B)
    if prediction_type == "v_prediction":
        return a.sqrt() * z_t - (1 - a).sqrt() * predicted
    z_0 = (z_t - (1 - a).sqrt() * predicted) / torch.where(a > 0, a, 1).sqrt()
    return torch.where(a > 0, z_0, 0)
