"""Overlaps of boxes, which every detector and score counts by."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sgg_fast.eval.detector import overlaps


def test_overlaps_against_counted_cells():
    rng = np.random.default_rng(3)
    corners = np.sort(rng.integers(0, 20, (6, 2, 2)), axis=1)
    boxes = corners.reshape(6, 4).astype(float)
    cells = np.zeros((6, 20, 20), bool)
    for n, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
        cells[n, y0:y1, x0:x1] = True
    for i, j in itertools.product(range(6), repeat=2):
        union = (cells[i] | cells[j]).sum()
        expected = (cells[i] & cells[j]).sum() / union if union else 0.0
        assert overlaps(boxes, boxes)[i, j] == pytest.approx(expected)
