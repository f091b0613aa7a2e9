"""Bootstrap intervals: against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sgg_fast.eval import bootstrap


def test_the_interval_of_one_seed_is_that_of_independent_graphs():
    values = np.random.default_rng(0).normal(0.4, 1.0, (1, 400))
    found = bootstrap.estimate(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_what_seeds_have_in_common_widens_the_interval():
    rng = np.random.default_rng(1)
    per_seed = rng.normal(0.0, 1.0, (8, 1)) + rng.normal(0.0, 0.1, (8, 50))
    found = bootstrap.estimate(per_seed)
    naive = 1.96 * per_seed.std() / math.sqrt(per_seed.size)
    assert found.high - found.low > 3 * 2 * naive
    same = bootstrap.estimate(per_seed)
    assert (same.low, same.high) == (found.low, found.high), "a pure function"


def test_what_is_not_there_is_left_out_of_the_mean():
    values = np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, 1.0]])
    assert bootstrap.estimate(values).mean == pytest.approx(2 / 3)
    assert math.isnan(bootstrap.estimate(np.full((2, 3), np.nan)).mean)
    assert math.isnan(bootstrap.estimate(np.empty((0, 0))).mean)


def test_pairing_finds_a_difference_that_graphs_would_hide():
    rng = np.random.default_rng(2)
    hardness = rng.normal(0.0, 1.0, (3, 60))
    a, b = hardness + 0.1 + rng.normal(0, 0.05, (3, 60)), hardness
    paired = bootstrap.difference(a, b)
    assert paired.low > 0.05
    assert bootstrap.estimate(a).low < bootstrap.estimate(b).high, "unpaired, they overlap"
    with pytest.raises(ValueError, match="not the same seeds and graphs"):
        bootstrap.difference(a, b[:2])


def test_an_estimate_reads_as_its_mean_and_interval():
    assert str(bootstrap.estimate(np.full((2, 5), 0.5))) == "0.500 [0.500, 0.500]"
    assert str(bootstrap.Estimate(0.25, -0.125, 1 / 3)) == "0.250 [-0.125, 0.333]"
