"""Intervals by a hierarchical bootstrap: seeds are redrawn, then the graphs within each of them.

Pictures of one seed are not independent; a bootstrap over pictures alone would give intervals that are too narrow.
Differences are paired: both models drew the same graph from the same noise. Letters: S seeds, G graphs, R redraws.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and the interval that holds it in `level` of the redraws."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values_SG: np.ndarray, num_redraws: int = 2000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Estimate the mean of `values` [S, G]; NaN marks a missing value. All NaN, and empty, give NaN.

    With one seed only graphs are redrawn: the interval then says nothing about other seeds.
    """
    values_SG = np.asarray(values_SG, dtype=float)
    if not (~np.isnan(values_SG)).any():
        return Estimate(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    num_seeds, num_graphs = values_SG.shape
    weight_SG = (~np.isnan(values_SG)).astype(float)
    filled_SG = np.nan_to_num(values_SG)
    means = np.full(num_redraws, np.nan)
    for r in range(num_redraws):
        seeds_S1 = rng.integers(num_seeds, size=(num_seeds, 1))
        graphs_SG = rng.integers(num_graphs, size=(num_seeds, num_graphs))
        total = weight_SG[seeds_S1, graphs_SG].sum()
        if total:
            means[r] = filled_SG[seeds_S1, graphs_SG].sum() / total
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(filled_SG.sum() / weight_SG.sum()), float(low), float(high))


def difference(
    a_SG: np.ndarray, b_SG: np.ndarray, num_redraws: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Estimate the mean of a - b over the pictures that both have. Raises ValueError if their shapes differ."""
    if np.shape(a_SG) != np.shape(b_SG):
        raise ValueError(f"not the same seeds and graphs: {np.shape(a_SG)} against {np.shape(b_SG)}")
    return estimate(np.asarray(a_SG, float) - np.asarray(b_SG, float), num_redraws, level, seed)
