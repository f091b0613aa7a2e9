"""Centres of COCO's masks against plain loops; what pycocotools would read past its memory for is a fault."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from sgg_fast.data.prepare.masks import mask_centre, run_lengths
from sgg_fast.data.prepare.records import FaultError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_centres_of_every_form_of_mask_by_plain_loops(width, height, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs, value = [], False
    for pixel in mask.flatten(order="F").tolist():  # column by column, from a run of zeros on
        if not runs or pixel != value:
            runs += [0] if not runs and pixel else []
            runs.append(0)
            value = pixel
        runs[-1] += 1
    assert run_lengths(packed["counts"].decode()).tolist() == runs
    points = [(x + 0.5, y + 0.5) for y in range(height) for x in range(width) if mask[y, x]]
    for counts in (packed["counts"].decode(), runs):
        centre = mask_centre({"size": [height, width], "counts": counts}, width, height)
        if not points:
            assert centre is None
            continue
        assert centre[0] == pytest.approx(sum(x for x, _ in points) / len(points) / width)
        assert centre[1] == pytest.approx(sum(y for _, y in points) / len(points) / height)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=12), st.binary(max_size=12))
def test_any_text_is_runs_or_a_fault(text, raw):
    """What pycocotools would read past its memory for: refused before it is asked."""
    for counts in (text, raw.decode("utf-8", "surrogateescape")):
        try:
            centre = mask_centre({"size": [5, 4], "counts": counts}, 4, 5)
        except FaultError:
            continue
        assert run_lengths(counts).sum() == 20 and (centre is None or all(0 < c < 1 for c in centre))


def test_centres_of_polygons_and_those_that_do_not_fit_the_image():
    """Two rectangles on whole pixels: their centre is the mean of their pixels' centres."""
    first, second = [2, 1, 6, 1, 6, 3, 2, 3], [10, 5, 12, 5, 12, 9, 10, 9]
    assert mask_centre([first], 20, 10) == pytest.approx((4 / 20, 2 / 10))
    assert mask_centre([first, second], 20, 10) == pytest.approx((7.5 / 20, 4.5 / 10)), "eight pixels each"
    for polygon, reason in (
        ([2, 1, 6, 1], "polygon of fewer than three points"),
        ([*first, 2], "polygon of fewer than three points"),
        ("2, 1", "polygon of fewer than three points"),
        ([2, 1, 6, 1, 6, float("nan")], "polygon with a coordinate that is not finite"),
        ([2, 1, 6, 1, 6, True], "polygon with a coordinate that is not finite"),
        ([2, 1, 22, 1, 6, 3], "polygon that leaves the image"),
        ([2, 1, 6, 12, 6, 3], "polygon that leaves the image"),
    ):
        said: list[str] = []
        assert mask_centre([polygon, first], 20, 10, said.append) == pytest.approx((0.2, 0.2))
        assert said == [f"{reason}; the object's other polygons are used"]
        with pytest.raises(FaultError, match=f"^{reason}$"):
            mask_centre([polygon], 20, 10)
    for segmentation, reason in (
        (None, "without a segmentation"),
        ([], "without a polygon"),
        ({"size": [20, 10], "counts": [200]}, "of another size"),
        ({"size": [10, 20], "counts": [199]}, "do not fill"),
        ({"size": [10, 20], "counts": None}, "without run lengths"),
    ):
        with pytest.raises(FaultError, match=reason):
            mask_centre(segmentation, 20, 10)
