"""The pure-torch form of factored second moments, by loops over rows and columns in float64."""

from __future__ import annotations

import math

import pytest
import torch
from sgg_kernels.reference.adafactor import Factored, adafactor, first_means
from sgg_kernels.reference.adam import CONTROL_SIZE, CORRECTION_2, FACTOR, Hyper
from sgg_kernels.reference.weights import Weights

SHAPES, OFFSETS, NUM = [(3, 5), (4, 2), (1, 7)], [0, 256, 512], 768


def test_means_start_on_multiples_of_four():
    assert first_means(SHAPES) == [[0, 0], [4, 8], [8, 12], [12, 20]]
    assert first_means([]) == [[0, 0]]


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_steps_by_loops(size):
    """Algorithm 4 of the paper with a constant beta_2; the update is clipped to a root mean square of 1."""
    firsts = first_means(SHAPES)
    rows = [[offset, *shape, *first, 0] for offset, shape, first in zip(OFFSETS, SHAPES, firsts, strict=False)]
    moments = Factored(torch.zeros(firsts[-1][0]), torch.zeros(firsts[-1][1]), torch.tensor(rows))
    weights, control, beta = Weights(torch.linspace(-1, 1, NUM)), torch.zeros(CONTROL_SIZE), 0.9
    exact, clipped = weights.param.double(), 0
    means = [([0.0] * num_r, [0.0] * num_c) for num_r, num_c in SHAPES]
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 3):
        grads = [size * number * torch.randn(math.prod(shape), generator=generator) for shape in SHAPES]
        control[FACTOR], control[CORRECTION_2] = 0.5, 1 - beta**number
        step = torch.tensor([number], dtype=torch.int32)
        adafactor(weights, moments, grads, OFFSETS, control, torch.tensor([1e-2]), step, Hyper(beta_2=beta))
        for grad, offset, (num_r, num_c), (row, column) in zip(grads, OFFSETS, SHAPES, means, strict=True):
            g = [[0.5 * grad[r * num_c + c].item() for c in range(num_c)] for r in range(num_r)]
            for r in range(num_r):
                row[r] = beta * row[r] + (1 - beta) * sum(x * x + 1e-30 for x in g[r]) / num_c
            for c in range(num_c):
                column[c] = beta * column[c] + (1 - beta) * sum(g[r][c] ** 2 + 1e-30 for r in range(num_r)) / num_r
            whole = (1 - beta**number) * sum(row) / num_r
            update = [g[r][c] / math.sqrt(row[r] * column[c] / whole) for r in range(num_r) for c in range(num_c)]
            rms = math.sqrt(sum(x * x for x in update) / len(update))
            clipped += rms > 1
            for i, x in enumerate(update):
                exact[offset + i] -= 1e-2 * x / max(rms, 1.0)
        torch.testing.assert_close(weights.param.double(), exact, rtol=1e-6, atol=1e-6)
    assert 0 < clipped < 9, "clipping is met and not met"
    for (_, num_r, num_c, first_r, first_c, _), (row, column) in zip(rows, means, strict=True):
        torch.testing.assert_close(moments.row[first_r : first_r + num_r], torch.tensor(row))
        torch.testing.assert_close(moments.column[first_c : first_c + num_c], torch.tensor(column))
