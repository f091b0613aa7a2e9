"""Which shape a batch is padded to. The host drew the batch, so it knows without asking the device.

Letters: S graphs of the set, B graphs drawn a step, N objects and E relations of a batch (in pre-training with full and
masked copies), K micro-batches of a step, T context tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sgg_fast.nn.conditioner import context_length

COPIES = 2
"""Of each graph in a batch: the full one and the masked one; graph negatives are one more."""

STEP_OBJECTS, STEP_RELATIONS = 32, 64
"""N and E of a bucket are multiples of these."""

SMALL = 1024
"""A worst case of at most so many objects is the only bucket: beside the optimiser its padding costs nothing."""

GROWTH = 1.1
"""From each bucket to the next: padding costs at most about a tenth, and few buckets are ever met."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Everything about a batch that decides the shapes of a step."""

    shape: tuple[int, int]
    """(N, E), the padding included."""
    bounds: tuple[int, int]
    """(objects, relations) that no graph of the batch exceeds; the context's T follows from the second."""


class Buckets:
    """A ladder of shapes for batches of `batch` graphs of a set with these sizes ([S, 2], image nodes included)."""

    def __init__(self, sizes: np.ndarray, batch: int, copies: int = COPIES) -> None:
        self.sizes, self.copies = sizes, copies
        num = copies * batch
        worst = num * sizes.max(axis=0)
        self.bounds = _bounds(sizes)
        self.ladder = [_rounded(worst)]
        if worst[0] > SMALL:
            scale = num * sizes.mean(axis=0)
            rungs = [_rounded(scale)]
            while rungs[-1][0] < self.ladder[0][0] or rungs[-1][1] < self.ladder[0][1]:
                scale = scale * GROWTH
                rungs.append(_rounded(np.minimum(scale, worst)))
            self.ladder = sorted(set(rungs))

    def of(self, ids_KB: np.ndarray) -> Bucket:
        """The smallest bucket that holds all copies of any micro-batch's graphs and an object of padding."""
        num_n, num_e = self.copies * self.sizes[ids_KB].sum(axis=1).max(axis=0)
        return Bucket(next(rung for rung in self.ladder if rung[0] > num_n and rung[1] >= num_e), self.bounds)


class ContextBuckets:
    """One worst case for each length of the context that `batch` graphs of a set of these `sizes` can need.

    Beside the UNet what padding costs is nothing; a longer context would cost in each of its attentions.
    """

    def __init__(self, sizes: np.ndarray, batch: int) -> None:
        self._length_S = _context_lengths(sizes)
        self.ladder: dict[int, Bucket] = {}
        """T -> the bucket of batches whose longest context is T."""
        for length in np.unique(self._length_S).tolist():
            within = sizes[self._length_S <= length]
            self.ladder[length] = Bucket(_rounded(batch * within.max(axis=0)), _bounds(within))

    def of(self, ids_KB: np.ndarray) -> Bucket:
        """The one bucket of all micro-batches of a step, for their gradients add up in one place."""
        return self.ladder[int(self._length_S[ids_KB].max())]


def _context_lengths(sizes: np.ndarray) -> np.ndarray:
    """[S] T of each graph alone."""
    relations, place_S = np.unique(sizes[:, 1], return_inverse=True)
    return np.array([context_length(number) for number in relations.tolist()])[place_S]


def _bounds(sizes: np.ndarray) -> tuple[int, int]:
    objects, relations = sizes.max(axis=0).tolist()
    return objects, relations


def _rounded(totals: np.ndarray) -> tuple[int, int]:
    """Up to whole steps, with room for at least one object of padding."""
    num_n, num_e = (int(np.ceil(total)) for total in totals)
    return -(-(num_n + 1) // STEP_OBJECTS) * STEP_OBJECTS, -(-num_e // STEP_RELATIONS) * STEP_RELATIONS
