"""Reference of `adam`: Adam (Kingma and Ba, 2015, algorithm 1) on flat buffers, all its decisions on the device.

Parameters and both moments are flat buffers of one layout; gradients stay where backward left them and come with
their offsets. `control` holds what changes from step to step, so that a step can be captured.
Letters: P elements of the flat buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .weights import Weights, read_weights, write_weights

INVERSE_SCALE, CORRECTION_1, CORRECTION_2, APPLIED, FACTOR, NORM = range(1, 7)
"""Places in `control`, fp32 [8]; the first and the last are free. The host writes one over the loss scale alone; the
two corrections `1 - beta^t` live on; the last three are this step's decision: whether it is applied (1 or 0), what
gradients are multiplied by, and their norm before clipping."""

CONTROL_SIZE = 8

BLOCK = 1024
"""Elements of a chunk, which a program of the kernels updates."""


class Hyper(NamedTuple):
    """What does not change within a run."""

    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    max_norm: float = 0.0
    """The gradient's norm is clipped to this; 0 leaves it alone."""


def adam_decide(squares: torch.Tensor, control: torch.Tensor, step: torch.Tensor, hyper: Hyper) -> None:
    """From the sum of squares of all gradients (scalar) whether and how step t = step + 1 is taken.

    A sum that is not finite leaves everything as it was. The corrections follow `c_t = beta c_(t-1) + (1 - beta)`,
    which keeps their relative error at a few units in the last place, where `1 - beta^t` would lose four digits.
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
    moment_1_P: torch.Tensor,
    moment_2_P: torch.Tensor,
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """The step that `adam_decide` has decided to take, in place; grads: [n] each, fp32 or bf16, at `offsets`.

    rate: its first element is the learning rate. Elements that no gradient covers stay as they are.
    """
    for grad, offset in zip(grads, offsets, strict=True):
        part = slice(offset, offset + grad.numel())
        grad = grad.float() * control[FACTOR]
        m = moment_1_P[part].lerp_(grad, 1 - hyper.beta_1)
        v = moment_2_P[part].mul_(hyper.beta_2).addcmul_(grad, grad, value=1 - hyper.beta_2)
        spread = v.sqrt().div_(control[CORRECTION_2].sqrt()).add_(hyper.eps)
        update = rate[0] / control[CORRECTION_1] * m / spread
        write_weights(weights, part, read_weights(weights, part) - update, step)


def squares_of(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of all gradients, fp32 scalar."""
    return torch.stack([grad.float().square().sum() for grad in grads]).sum()
