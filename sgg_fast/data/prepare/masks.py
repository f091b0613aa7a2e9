"""Decodes COCO's segmentations (polygons and run lengths) with pycocotools, after a check that they fit the image.

The C code of pycocotools does not check bounds: if the runs end early, the rest of the mask is uninitialised, and a
polygon far outside the image can allocate any amount of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sgg_fast.data.prepare.records import FaultError


def mask_centre(
    segmentation: Any, width: int, height: int, say: Callable[[str], None] = lambda reason: None
) -> tuple[float, float] | None:
    """Mean x and y of a mask's pixels in shares of the image (0..1); None for an empty mask. Raises `FaultError`.

    Bad polygons of a list are skipped and reported to `say`.
    """
    if isinstance(segmentation, list):
        rle = _of_polygons(segmentation, width, height, say)
    elif isinstance(segmentation, dict):
        rle = _checked_runs(segmentation, width, height)
    else:
        raise FaultError("object without a segmentation")
    mask_HW = coco_mask.decode(rle)
    column_W, row_H = mask_HW.sum(axis=0, dtype=np.int64), mask_HW.sum(axis=1, dtype=np.int64)
    area = int(column_W.sum())
    if not area:
        return None
    x = float((column_W * (np.arange(width) + 0.5)).sum()) / (area * width)
    return x, float((row_H * (np.arange(height) + 0.5)).sum()) / (area * height)


def _of_polygons(polygons: list[Any], width: int, height: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run lengths of a list of polygons, each x, y, x, y, ..."""
    faults = [_polygon_fault(polygon, width, height) for polygon in polygons]
    good = [polygon for polygon, fault in zip(polygons, faults, strict=True) if not fault]
    if not good:
        raise FaultError(next(iter(faults), "segmentation without a polygon"))
    for fault in filter(None, faults):
        say(f"{fault}; the object's other polygons are used")
    return coco_mask.merge(coco_mask.frPyObjects(good, height, width))


def _polygon_fault(polygon: Any, width: int, height: int) -> str:
    """Reason why a polygon is unsafe for pycocotools, or ""."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "polygon of fewer than three points"
    for k, value in enumerate(polygon):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            return "polygon with a coordinate that is not finite"
        if not -1 <= value <= (height if k % 2 else width) + 1:
            return "polygon that leaves the image"
    return ""


def _checked_runs(rle: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Run lengths in compressed form that fill the image exactly."""
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        raise FaultError("mask of another size than the image")
    if isinstance(counts, str):
        runs = run_lengths(counts)
    elif isinstance(counts, list) and all(isinstance(run, int) and not isinstance(run, bool) for run in counts):
        runs = np.array([min(max(run, -1), 2**40) for run in counts], np.int64)
    else:
        raise FaultError("mask without run lengths")
    if not len(runs) or runs.min() < 0 or runs.sum() != width * height:
        raise FaultError("mask whose run lengths do not fill the image")
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": counts.encode("ascii")}


def run_lengths(text: str) -> np.ndarray:
    """int64 runs from COCO's compressed form. Raises `FaultError` for other text.

    Each number is a sequence of characters with six bits above "0", lowest first: five bits of the number and one
    continuation bit. From the third number on, each is the difference to the number two places before.
    """
    raw = text.encode("utf-8", "surrogatepass")
    bits = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        raise FaultError("mask whose run lengths are not in COCO's form")
    last = np.flatnonzero(~bits & 32)
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 6:
        raise FaultError("mask with a run longer than any image")
    place = np.arange(len(bits)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((bits & 31) << (5 * place), first)
    values -= np.where(bits[last] & 16, 1 << (5 * (last - first + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
