"""Reference of `adam`: Adam (Kingma and Ba, 2015, algorithm 1) on flat buffers, with all decisions on the device.

Parameters and both moments are flat buffers of one layout; gradients stay where backward left them and have offsets
in the buffers. `control` holds the values that change from step to step, so that a step can be captured.
Letters: P elements of the flat buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .weights import Weights, read_weights, write_weights

INVERSE_SCALE, CORRECTION_1, CORRECTION_2, APPLIED, FACTOR, NORM = range(1, 7)
"""Indices in `control`, fp32 [8]; the first and the last element are free. The host writes 1 / loss scale only. The
two corrections `1 - beta^t` are kept across steps. The last three are this step's decision: applied (1 or 0), factor
of the gradients, and norm of the gradients before clipping."""

CONTROL_SIZE = 8

BLOCK = 1024
"""Elements of a chunk; one program updates one chunk."""


class Hyper(NamedTuple):
    """The hyperparameters that stay constant within a run."""

    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    max_norm: float = 0.0
    """Largest norm of the gradient; 0 turns clipping off."""


def adam_decide(squares: torch.Tensor, control: torch.Tensor, step: torch.Tensor, hyper: Hyper) -> None:
    """Decide on step t = step + 1 from the sum of squares of all gradients (scalar).

    A step with NaN or Inf is skipped. The corrections follow `c_t = beta c_(t-1) + (1 - beta)`, whose relative error
    is a few units in the last place; `1 - beta^t` would lose four digits.
    """
    norm = squares.sqrt() * control[INVERSE_SCALE]
    applied = norm.isfinite()
    clip = (hyper.max_norm / (norm + 1e-6)).clamp(max=1.0) if hyper.max_norm else torch.ones_like(norm)
    for place, beta in ((CORRECTION_1, hyper.beta_1), (CORRECTION_2, hyper.beta_2)):
        control[place] = torch.where(applied, control[place] * beta + (1 - beta), control[place])
    control[APPLIED], control[NORM] = applied.to(control.dtype), norm
    control[FACTOR] = control[INVERSE_SCALE] * clip
    step += applied.to(step.dtype)


def adam_update(
    weights: Weights,
    moments: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Apply the step that `adam_decide` decided on, in place; grads: [n] each, fp32 or bf16, at `offsets`.

    moments: two, fp32 [P]. rate: its first element is the learning rate. Elements without a gradient do not change.
    """
    for grad, offset in zip(grads, offsets, strict=True):
        part = slice(offset, offset + grad.numel())
        grad = grad.float() * control[FACTOR]
        m = moments[0][part].lerp_(grad, 1 - hyper.beta_1)
        v = moments[1][part].mul_(hyper.beta_2).addcmul_(grad, grad, value=1 - hyper.beta_2)
        spread = v.sqrt().div_(control[CORRECTION_2].sqrt()).add_(hyper.eps)
        update = rate[0] / control[CORRECTION_1] * m / spread
        write_weights(weights, part, read_weights(weights, part) - update, step)


def squares_of(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of all gradients, fp32 scalar."""
    return torch.stack([grad.float().square().sum() for grad in grads]).sum()
