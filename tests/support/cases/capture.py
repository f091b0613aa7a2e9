"""Inputs and fixtures that tests share with `test_buckets.py`."""

from __future__ import annotations

from collections import Counter

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from support.cases.stage import GRAPHS, IDS, STEP, cache, pretrain_stage  # noqa: F401  (a fixture)


def visual_genome(num: int = 4000) -> np.ndarray:
    """[S, 2] sizes within sg2im's filters: 3-30 objects, 1-30 relations, and the image node and relations."""
    rng = np.random.default_rng(0)
    objects = 3 + np.minimum(rng.poisson(rng.gamma(2.0, 3.5, num)), 27)
    relations = 1 + np.minimum(rng.poisson(rng.gamma(2.0, 0.23, num) * objects), 29)
    objects[:2], relations[:2] = 30, 30
    return np.stack([objects + 1, relations + objects], axis=1)


class Watcher(TorchDispatchMode):
    """Every aten operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


FORBIDDEN = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2", "is_nonzero"}
"""What reads a number back, sizes a tensor by data, or copies a number from memory that is not pinned."""
