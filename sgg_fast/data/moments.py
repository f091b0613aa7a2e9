"""Posterior moments that stay in files or in host memory: a step's rows are read ahead of it and sent to its device.

Letters: M images, S samples (S = D M for D draws of relations), B samples of a batch, c and h, w channels and sides of
a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

AHEAD = 4
"""Steps whose rows are read before their turn."""


class MomentRows:
    """[S, 2c, h, w] moments in memory maps or arrays. A step reads `current`, the rows that `bring` sent."""

    def __init__(self, shards: Sequence[np.ndarray], draws: int) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self.shape = (draws * int(self._starts[-1]), *shards[0].shape[1:])
        self.dtype: torch.dtype = getattr(torch, shards[0].dtype.name)
        self.current: torch.Tensor | None = None
        """[B, 2c, h, w] on the device of the step."""
        self._reader: ThreadPoolExecutor | None = None
        self._coming: dict[bytes, Future[torch.Tensor]] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids_B: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Rows [B, 2c, h, w] in host memory, read now."""
        return self._read(np.asarray(ids_B))

    def _read(self, ids_B: np.ndarray) -> torch.Tensor:
        image_B = ids_B % self._starts[-1]
        shard_B = np.searchsorted(self._starts, image_B, side="right") - 1
        rows = [self._shards[k][i - self._starts[k]] for k, i in zip(shard_B, image_B, strict=True)]
        return torch.from_numpy(np.stack(rows))

    def expect(self, ids_B: np.ndarray) -> None:
        """Read these rows in the background, for a later `take`."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="moments")
        key = ids_B.tobytes()
        if key not in self._coming:
            self._coming[key] = self._reader.submit(self._read, ids_B)

    def take(self, ids_B: np.ndarray) -> torch.Tensor:
        """Rows [B, 2c, h, w] in host memory: those that were read ahead, or read now."""
        coming = self._coming.pop(ids_B.tobytes(), None)
        return self._read(ids_B) if coming is None else coming.result()

    def bring(self, ids_B: np.ndarray, device: torch.device) -> None:
        """Make the rows of these samples `current` on the device."""
        self.current = self.take(ids_B).to(device)

    def on(self, device: torch.device) -> torch.Tensor:
        """All rows in the memory of `device`."""
        rows = read_to(self._shards, device)
        return rows if self.shape[0] == len(rows) else rows.repeat(self.shape[0] // len(rows), 1, 1, 1)


_ROWS = 1 << 16


def read_to(parts: Sequence[np.ndarray], device: torch.device | str) -> torch.Tensor:
    """Memory maps [n, ...] one after the other as one tensor on `device`, `_ROWS` rows in memory at a time."""
    whole = torch.empty(
        sum(map(len, parts)), *parts[0].shape[1:], dtype=getattr(torch, parts[0].dtype.name), device=device
    )
    at = 0
    for part in parts:
        for first in range(0, len(part), _ROWS):
            rows = torch.from_numpy(np.array(part[first : first + _ROWS]))
            whole[at : at + len(rows)].copy_(rows)
            at += len(rows)
    return whole
