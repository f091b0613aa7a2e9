"""Min-SNR weighting of the diffusion loss (Hang et al., 2023)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_runs import trainer

from sgg_fast.config import ConfigError
from sgg_fast.diffusion.losses import min_snr_weight
from sgg_fast.recipes import recipe


@pytest.mark.parametrize(("kind", "extra"), [("epsilon", 0), ("v_prediction", 1)])
def test_the_weight_by_hand(kind, extra):
    alpha_bar = [0.9999, 0.95, 0.5, 0.01]
    got = min_snr_weight(kind, torch.tensor(alpha_bar, dtype=torch.float64), 5.0).tolist()
    for weight, a in zip(got, alpha_bar, strict=True):
        snr = a / (1 - a)
        assert weight == pytest.approx(min(snr, 5.0) / (snr + extra))
    assert min_snr_weight(kind, torch.tensor(alpha_bar), 0.0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("kind", "at_0"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_the_weight_at_both_ends_of_a_schedule_is_its_limit(kind, at_0):
    """abar = 0: zero terminal SNR (Lin et al., 2024); abar = 1: no noise."""
    assert min_snr_weight(kind, torch.tensor([0.0, 1.0]), 5.0).tolist() == [at_0, 0.0]
    near = min_snr_weight(kind, torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64), 5.0).tolist()
    assert near == pytest.approx([at_0, 0.0], abs=1e-9)


def test_a_step_weights_each_image_by_its_own_time(tmp_path):
    """With one image a step the logged loss and its chance are the unweighted ones times that image's weight."""
    ids = np.array([3])
    plain, weighted = (trainer(tmp_path, "finetune", min_snr_gamma=g).engine.module(ids, 5) for g in (0.0, 0.5))
    share = weighted.losses["diff"] / plain.losses["diff"]
    assert plain.chance["diff"] == 1 and weighted.chance["diff"] == pytest.approx(share.item(), rel=1e-5)
    assert 0 < share < 1
    saved = 0.5 * (1 - share) * plain.losses["diff"]
    assert (plain.total - weighted.total).item() == pytest.approx(saved.item(), rel=1e-4)


def test_a_negative_gamma_is_refused():
    with pytest.raises(ConfigError, match="--min-snr-gamma must not be negative"):
        recipe("toy", min_snr_gamma=-1.0)
