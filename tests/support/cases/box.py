"""Inputs and fixtures that tests share with `test_geometry.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sgg_fast.data.cache import TrainingCache
from support.cases.stage import (
    GRAPHS,
)


def random_boxes(num: int, seed: int) -> np.ndarray:
    """x0, y0, x1, y1; the first has no width."""
    corners = np.random.default_rng(seed).uniform(0, 1, (num, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    if num > 4:
        boxes[0, 2] = boxes[0, 0]
    return boxes


BOXES = [random_boxes(len(graph.objects), i) for i, graph in enumerate(GRAPHS)]


@pytest.fixture(scope="module")
def boxed(cache: TrainingCache) -> TrainingCache:
    rows = [np.concatenate([boxes, [[0, 0, 1, 1]]]) for boxes in BOXES]
    return dataclasses.replace(cache, boxes=torch.from_numpy(np.concatenate(rows).astype(np.float32)))
