"""GEMMs with rounded operands: the rounding itself, every product of a step, and a curve."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_runs import TINY

from benchmarks.steps import gemm_precision as measured
from sgg_fast import recipes


def exactly(x: np.ndarray, bits: int) -> np.ndarray:
    """The nearest number with this many mantissa bits, ties away from zero, by decimals in float64."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    scaled = np.abs(fraction) * 2.0 ** (bits + 1)
    return np.copysign(np.ldexp(np.floor(scaled + 0.5) / 2.0 ** (bits + 1), exponent), x)


@pytest.mark.parametrize("bits", [10, 7])
def test_numbers_are_rounded_to_nearest_and_ties_away_from_zero(bits):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.logspace(-20, 20, 1000, dtype=np.float32)
    tie = np.float32(1 + 2.0 ** -(bits + 1))
    x = np.concatenate([x, [tie, -tie, 2 - 2.0**-20, 0.0]]).astype(np.float32)
    found = measured.rounded(torch.from_numpy(x), bits).numpy()
    assert (found == exactly(x, bits)).all() and found[1000] == 1 + 2.0**-bits and found[1002] == 2
    if bits == 7:
        ours, torchs = found[:1000], torch.from_numpy(x[:1000]).bfloat16().float().numpy()
        assert (ours == torchs).all(), "torch's bf16 differs at ties only"


def test_what_is_not_finite_stays_and_fp32_is_not_touched():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.2345678])
    assert measured.rounded(x, 23) is x
    found = measured.rounded(x, 10)
    assert found[:2].tolist() == [torch.inf, -torch.inf] and found[2].isnan() and found[3] != x[3]


def test_both_operands_of_every_product_are_rounded_in_backward_too():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(5, 5, generator=generator).requires_grad_() for _ in range(2))
    arriving = torch.randn(5, 5, generator=generator)
    with measured.gemms_in("tf32") as mode:
        out = x @ weight
        out.backward(arriving)
    assert mode.rounds == 6, "two of the product, two of each of its gradients"
    x_, weight_, arriving_ = (measured.rounded(t.detach(), 10) for t in (x, weight, arriving))
    assert torch.equal(out.detach(), x_ @ weight_)
    assert torch.equal(x.grad, arriving_ @ weight_.T) and torch.equal(weight.grad, x_.T @ arriving_)
    with measured.gemms_in("fp32") as mode:
        assert mode is None and torch.equal((x @ weight).detach(), x.detach() @ weight.detach())


def test_points_of_a_curve_are_means_of_equal_shares():
    assert measured.shares([float(k) for k in range(20)]) == [0.5 + 2 * k for k in range(10)]
    assert measured.shares([3.0, 5.0]) == [3.0, 5.0]


def test_curves_of_one_seed_see_the_same_samples(monkeypatch):
    small = {**TINY, "num_scenes": 32, "validation_pairs": 4, "width": 32, "num_layers": 1}
    known = recipes.recipe
    monkeypatch.setattr(recipes, "recipe", lambda name, **settings: known(name, **{**small, **settings}))
    (exact, scores), (coarse, _) = (measured.curve(precision, 0, 2) for precision in ("fp32", "bf16"))
    assert len(exact) == len(coarse) == 2 and all(0 <= score <= 1 for score in scores.values())
    assert exact != coarse and exact == [pytest.approx(loss, rel=2e-2) for loss in coarse]
