"""The pure-torch form of Adam on flat buffers against torch's own, and its decision on a step."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels.reference.adam import (
    APPLIED,
    CONTROL_SIZE,
    CORRECTION_1,
    CORRECTION_2,
    FACTOR,
    INVERSE_SCALE,
    NORM,
    Hyper,
    adam_decide,
    adam_update,
    squares_of,
)
from sgg_kernels.reference.weights import Weights
from torch import nn

NUMELS, OFFSETS, NUM = [3, 300, 1], [0, 4, 312], 320


def grads_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(num, generator=generator) for num in NUMELS]


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_steps_are_torchs_adam(max_norm):
    """Gradients scaled by 1024, clipped by their true norm; what has no gradient stays."""
    start = torch.linspace(-1, 1, NUM)
    weights, moments = Weights(start.clone()), (torch.zeros(NUM), torch.zeros(NUM))
    theirs = [nn.Parameter(start[first : first + num].double()) for first, num in zip(OFFSETS, NUMELS, strict=True)]
    optimizer = torch.optim.Adam(theirs, 1e-2, betas=(0.8, 0.99), eps=1e-6)
    control, step, hyper = (
        torch.zeros(CONTROL_SIZE),
        torch.zeros(1, dtype=torch.int32),
        Hyper(0.8, 0.99, 1e-6, max_norm),
    )
    control[INVERSE_SCALE] = 2.0**-10
    for number in range(5):
        grads = grads_of(number)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.double()
        norm = nn.utils.clip_grad_norm_(theirs, max_norm or torch.inf)
        optimizer.step()
        scaled = [1024 * grad for grad in grads]
        adam_decide(squares_of(scaled), control, step, hyper)
        assert control[NORM].item() == pytest.approx(norm.item(), rel=1e-6)
        adam_update(weights, moments, scaled, OFFSETS, control, torch.tensor([1e-2]), step, hyper)
        for first, num, parameter in zip(OFFSETS, NUMELS, theirs, strict=True):
            found = weights.param[first : first + num].double()
            torch.testing.assert_close(found, parameter.detach(), rtol=1e-6, atol=1e-6)
    assert step.item() == 5
    idle = torch.ones(NUM, dtype=torch.bool)
    for first, num in zip(OFFSETS, NUMELS, strict=True):
        idle[first : first + num] = False
    assert idle.sum() == 16 and torch.equal(weights.param[idle], start[idle])
    assert not any(moment[idle].any() for moment in moments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_step_that_is_not_finite_is_not_taken(bad):
    """1e30, whose square overflows, among them; the corrections wait for the next step."""
    control, step = torch.zeros(CONTROL_SIZE), torch.zeros(1, dtype=torch.int32)
    control[INVERSE_SCALE] = 1
    adam_decide(squares_of(grads_of(0)), control, step, Hyper())
    before = control.clone()
    grads = grads_of(1)
    grads[1][5] = bad
    adam_decide(squares_of(grads), control, step, Hyper())
    assert control[APPLIED] == 0 and step.item() == 1
    assert torch.equal(control[[CORRECTION_1, CORRECTION_2]], before[[CORRECTION_1, CORRECTION_2]])


def test_corrections_keep_their_digits_and_a_small_gradient_is_not_clipped():
    control, step, hyper = torch.zeros(CONTROL_SIZE), torch.zeros(1, dtype=torch.int32), Hyper(max_norm=10.0)
    control[INVERSE_SCALE] = 0.5
    for number in range(1, 20):
        adam_decide(torch.tensor(4.0), control, step, hyper)
        for place, beta in ((CORRECTION_1, 0.9), (CORRECTION_2, 0.999)):
            assert control[place].item() == pytest.approx(1 - beta**number, rel=5e-7)
    assert (control[NORM], control[FACTOR], control[APPLIED]) == (1.0, 0.5, 1.0)
