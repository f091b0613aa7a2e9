"""Which shape a batch of pre-training is padded to. The host drew the batch, so it knows without asking the device.

Letters: S graphs of the set, B graphs drawn a step, N objects and E relations of a batch (full and masked copies).
"""

from __future__ import annotations

import numpy as np

COPIES = 2
"""Of each graph in a batch: the full one and the masked one."""

STEP_OBJECTS, STEP_RELATIONS = 32, 64
"""N and E of a bucket are multiples of these."""

SMALL = 1024
"""A worst case of at most so many objects is the only bucket: beside the optimiser its padding costs nothing."""

GROWTH = 1.1
"""From each bucket to the next: padding costs at most about a tenth, and few buckets are ever met."""


class Buckets:
    """A ladder of shapes for batches of `batch` graphs of a set with these sizes ([S, 2], image nodes included)."""

    def __init__(self, sizes: np.ndarray, batch: int) -> None:
        self.sizes, self.batch = sizes, batch
        num = COPIES * batch
        worst = num * sizes.max(axis=0)
        self.bounds: tuple[int, int] = tuple(sizes.max(axis=0).tolist())
        """(objects, relations) of the largest graph."""
        self.ladder = [_rounded(worst)]
        if worst[0] > SMALL:
            scale = num * sizes.mean(axis=0)
            rungs = [_rounded(scale)]
            while rungs[-1][0] < self.ladder[0][0] or rungs[-1][1] < self.ladder[0][1]:
                scale = scale * GROWTH
                rungs.append(_rounded(np.minimum(scale, worst)))
            self.ladder = sorted(set(rungs))

    def of(self, ids: np.ndarray) -> tuple[int, int]:
        """(N, E) of the smallest bucket that holds both copies of the graphs `ids` and an object of padding."""
        num_n, num_e = COPIES * self.sizes[ids].sum(axis=0)
        return next(rung for rung in self.ladder if rung[0] > num_n and rung[1] >= num_e)


def _rounded(totals: np.ndarray) -> tuple[int, int]:
    """Up to whole steps, with room for at least one object of padding."""
    num_n, num_e = (int(np.ceil(total)) for total in totals)
    return -(-(num_n + 1) // STEP_OBJECTS) * STEP_OBJECTS, -(-num_e // STEP_RELATIONS) * STEP_RELATIONS
