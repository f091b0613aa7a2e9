"""The shape that a batch is padded to. The host draws the batch, so it knows the shape without asking the device.

Letters: S graphs of the set, B graphs drawn a step, N objects and E relations of a batch (in pre-training with full and
masked copies), K micro-batches of a step, T context tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sgg_fast.nn.conditioner import context_length

COPIES = 2
"""Copies of each graph in a batch: the full one and the masked one. Graph negatives add a third."""

STEP_OBJECTS, STEP_RELATIONS = 32, 64
"""N and E of a bucket are multiples of these."""

SMALL = 1024
"""A worst case of at most this many objects is the only bucket: its padding is cheap beside the optimiser."""

GROWTH = 1.1
"""Ratio of one bucket to the one before. Padding costs at most about a tenth, and a run meets few buckets."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The properties of a batch that decide the shapes of a step."""

    shape: tuple[int, int]
    """(N, E), padding included."""
    bounds: tuple[int, int]
    """Upper bounds (objects, relations) of each graph of the batch; the second one gives the context's T."""


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
        """The smallest bucket that holds all copies of the graphs of any micro-batch and one padding object."""
        num_n, num_e = self.copies * self.sizes[ids_KB].sum(axis=1).max(axis=0)
        return Bucket(next(rung for rung in self.ladder if rung[0] > num_n and rung[1] >= num_e), self.bounds)

    def examples(self) -> dict[Bucket, int]:
        """None: pre-training is small, so each bucket is warmed up when it is met."""
        return {}


class ContextBuckets:
    """One worst-case bucket for each context length that `batch` graphs of a set of these `sizes` can need.

    Padding is cheap beside the UNet. A longer context is not: it costs time in each attention layer.
    """

    def __init__(self, sizes: np.ndarray, batch: int) -> None:
        self._length_S = _context_lengths(sizes)
        self.ladder: dict[int, Bucket] = {}
        """T -> the bucket of batches whose longest context is T."""
        for length in np.unique(self._length_S).tolist():
            within = sizes[self._length_S <= length]
            self.ladder[length] = Bucket(_rounded(batch * within.max(axis=0)), _bounds(within))

    def of(self, ids_KB: np.ndarray) -> Bucket:
        """The bucket that all micro-batches of a step share, because their gradients are added in place."""
        return self.ladder[int(self._length_S[ids_KB].max())]

    def examples(self) -> dict[Bucket, int]:
        """Every bucket, the one of the longest context first, with a sample of which any number fits in."""
        shortest = int(self._length_S.argmin())
        return {self.ladder[length]: shortest for length in sorted(self.ladder, reverse=True)}


def _context_lengths(sizes: np.ndarray) -> np.ndarray:
    """[S] T of each graph by itself."""
    relations, place_S = np.unique(sizes[:, 1], return_inverse=True)
    return np.array([context_length(number) for number in relations.tolist()])[place_S]


def _bounds(sizes: np.ndarray) -> tuple[int, int]:
    objects, relations = sizes.max(axis=0).tolist()
    return objects, relations


def _rounded(totals: np.ndarray) -> tuple[int, int]:
    """Round up to whole steps, with room for at least one padding object."""
    num_n, num_e = (int(np.ceil(total)) for total in totals)
    return -(-(num_n + 1) // STEP_OBJECTS) * STEP_OBJECTS, -(-num_e // STEP_RELATIONS) * STEP_RELATIONS
