"""Limits of a scheduler, found by a trial: it samples a single number through all its steps."""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

import torch

from .sampling import sample_latents

LATE = 0.85
"""Lowest first timestep, as a share of the noise levels. Below it, pure noise differs too much from a real z_t."""


def refusal(scheduler: Any, num_steps: int) -> str:
    """Reason why `scheduler` cannot take `num_steps` steps, with a possible number; "" if it can. No side effects."""
    if _runs(scheduler, num_steps):
        return ""
    trained = int(scheduler.config.num_train_timesteps)
    # The limits lie near the number of noise levels, up to the offsets.
    near = (n for n in range(min(num_steps - 1, trained), max(trained - 5, 0), -1) if _runs(scheduler, n))
    most = next(near, None)
    return f"this scheduler takes at most {most}" if most else "this scheduler cannot take that many"


def late_start(scheduler: Any, num_steps: int) -> str:
    """A warning if the steps begin far below the highest noise level, which makes the picture worse; else ""."""
    trial = type(scheduler).from_config(scheduler.config)
    trial.set_timesteps(num_steps)
    first, trained = float(trial.timesteps.max()), int(scheduler.config.num_train_timesteps)
    if first >= LATE * trained:
        return ""
    return (
        f"with {num_steps} steps this scheduler begins at noise level {first:.0f} of {trained}: expect worse pictures"
    )


def _runs(scheduler: Any, num_steps: int) -> bool:
    """True if all steps lie within the trained noise levels, raise nothing, and give a finite result."""
    return _trial_ends(type(scheduler).__name__, scheduler.to_json_string(), num_steps)


@functools.lru_cache(256)
def _trial_ends(kind: str, config: str, num_steps: int) -> bool:
    try:
        trial = getattr(importlib.import_module("diffusers"), kind).from_config(json.loads(config))
        latents = sample_latents(
            lambda z, t: 0.5 * z, trial, torch.ones(1, 1, 1, 1), num_steps, 1.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return bool(torch.isfinite(latents).all()) and float(trial.timesteps.max()) < trial.config.num_train_timesteps
    except Exception:  # border
        return False
