"""Min-SNR weighting in a training step, and the bound of its setting."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_runs import trainer

from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe


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
