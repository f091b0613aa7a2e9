"""The interface of detectors. The detectors themselves: `detectors.py`.

Letters: B pictures, N requested objects, H, W = size in pixels. Boxes: x0 y0 x1 y1 in picture units (0..1), y down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sgg_fast.graph import SceneGraph


@dataclasses.dataclass(frozen=True)
class Instance:
    """One object in a picture."""

    category: str
    colour: str | None
    """The likeliest colour, whatever the category; None if the detector reads no colours."""
    box: np.ndarray
    """float32 [4]; includes hidden parts if the detector estimates them."""
    mask: np.ndarray | None
    """bool [H, W], the pixels that show it; None if the detector gives only boxes."""
    confidence: float
    """0..1."""


class Detector(Protocol):
    """Finds instances and parses the names of a graph."""

    name: str
    """Printed beside every number."""

    def find(self, images: np.ndarray, graphs: Sequence[SceneGraph]) -> list[list[Instance]]:
        """The instances of each picture, uint8 [B, H, W, 3]; an open-vocabulary one looks for the graph's names."""
        ...

    def parse(self, name: str) -> tuple[str, str | None]:
        """Category and colour of a name of a graph."""
        ...


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [N, 4] and [M, 4], as [N, M]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=-1)
    area_a, area_b = (np.prod(np.maximum(box[:, 2:] - box[:, :2], 0.0), axis=-1) for box in (a, b))
    return shared / np.maximum(area_a[:, None] + area_b[None] - shared, 1e-9)
