"""The order in which processes read samples."""

from __future__ import annotations

import numpy as np


class SampleOrder:
    """Sample order of all epochs; each epoch is a permutation from the seed.

    Process r of W reads positions (step W + r) B .. + B, so W processes with batch B read what one process reads with
    batch W B.
    """

    def __init__(self, num_samples: int, batch: int, seed: int, rank: int, world_size: int) -> None:
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.rank, self.world_size = rank, world_size
        self._epochs: dict[int, np.ndarray] = {}

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= number - 1}
            self._epochs[number] = np.random.default_rng([self.seed, number]).permutation(self.num_samples)
        return self._epochs[number]

    def at(self, step: int) -> np.ndarray:
        """[B] int64 sample ids of `step` (from 0)."""
        first = (step * self.world_size + self.rank) * self.batch
        epoch, place = np.divmod(np.arange(first, first + self.batch), self.num_samples)
        return np.concatenate([self._epoch(k)[place[epoch == k]] for k in range(epoch[0], epoch[-1] + 1)])
