"""Reference of `adafactor`: the second moment is kept as the means of its rows and columns; there is no first one.

The second moment of a matrix is Adafactor's (Shazeer and Stern, 2018, algorithm 4): the running means of g^2 over each
row and over each column, `v_ij = row_i column_j / mean(row)`. beta_2 is constant and its start is corrected as in Adam,
which equals a growing beta_2 (section 7.1). The update `g / sqrt(v)` is clipped by its root mean square (algorithm 4,
line 9). The learning rate is Adam's: neither relative to the step nor to the weight.

A convolution's weight is the matrix of its memory order: [O, kH kW I] in channels_last.
Letters: M matrices of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .adam import CORRECTION_2, FACTOR, Hyper
from .weights import Weights, read_weights, write_weights

EPS_1 = 1e-30
"""Added to each g^2, so that no mean is 0 (algorithm 4, line 4)."""

LARGEST_RMS = 1.0
"""Updates of a larger root mean square are scaled down to it: d of algorithm 4."""


def first_means(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """[M + 1, 2] the indices of the first row's mean and of the first column's mean of each matrix, and the ends."""
    ends = [[0, 0]]
    for shape in shapes:
        ends.append([end + -(-size // 4) * 4 for end, size in zip(ends[-1], shape, strict=True)])
    return ends


class Factored(NamedTuple):
    """The factors of the second moment."""

    row: torch.Tensor
    """fp32 [sum of R]: the mean of g^2 of each row, of one matrix after the other, each from a multiple of 4 on."""
    column: torch.Tensor
    """fp32 [sum of C]: that of each column."""
    matrices: torch.Tensor
    """int64 [M, 6]: offset in the buffers, R, C, index of the first row's mean, of the first column's mean; free."""


def adafactor(
    weights: Weights,
    moments: Factored,
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Apply the step that `reference.adam.adam_decide` decided on, in place. grads: [n] each, fp32 or bf16.

    offsets: those of `matrices`. Of hyper, beta_2 is used.
    """
    matrix_at = {found[0]: found for found in moments.matrices.tolist()}
    for grad, offset in zip(grads, offsets, strict=True):
        _, num_rows, num_columns, first_row, first_column, _ = matrix_at[offset]
        g_RC = grad.float().view(num_rows, num_columns) * control[FACTOR]
        squares = g_RC.square() + EPS_1
        row = moments.row[first_row : first_row + num_rows]
        column = moments.column[first_column : first_column + num_columns]
        row.lerp_(squares.mean(1), 1 - hyper.beta_2)
        column.lerp_(squares.mean(0), 1 - hyper.beta_2)
        # Rooted one by one: their product may fall below fp32's range.
        scale = (control[CORRECTION_2] * row.mean()).sqrt()
        update = g_RC * scale * row.rsqrt()[:, None] * column.rsqrt()
        update *= LARGEST_RMS / update.square().mean().sqrt().clamp(min=LARGEST_RMS)
        part = slice(offset, offset + grad.numel())
        write_weights(weights, part, read_weights(weights, part) - rate[0] * update.flatten(), step)
