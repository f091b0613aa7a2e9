"""Published figures: each row of the paper's table in its columns."""

from __future__ import annotations

import itertools
import math

from sgg_fast.eval.published import COCO, PUBLISHED, TABLE_1, VG, _table_1


def test_every_row_of_table_1_has_what_all_its_methods_share():
    """FID and IS rise from 128 to 256 pixels; Visual Genome's FID is below COCO-Stuff's. Swapped columns would not."""
    row = _table_1(*map(float, range(1, 9)))
    assert row.figures == {(COCO, 128): (1, 2), (COCO, 256): (3, 4), (VG, 128): (5, 6), (VG, 256): (7, 8)}
    rows = [entry for entry in PUBLISHED.values() if entry.verified]
    assert len(rows) == 5 and {entry.source for entry in rows} == {TABLE_1}
    for entry, name in itertools.product(rows, (COCO, VG)):
        (fid, score), (larger_fid, larger_score) = entry.figures[name, 128], entry.figures[name, 256]
        assert larger_fid > fid and larger_score > score
    assert all(entry.figures[VG, side][0] < entry.figures[COCO, side][0] for entry in rows for side in (128, 256))
    best = {cell: min(entry.figures[cell][0] for entry in rows) for cell in row.figures}
    assert best == {cell: PUBLISHED["SGG-IG"].figures[cell][0] for cell in row.figures}, "the paper's claim"


def test_a_figure_from_elsewhere_says_so():
    others = [entry for entry in PUBLISHED.values() if not entry.verified]
    assert others and all(entry.source != TABLE_1 and entry.note for entry in others)
    for pair in itertools.chain.from_iterable(entry.figures.values() for entry in PUBLISHED.values()):
        assert all(value is None or (math.isfinite(value) and value > 0) for value in pair), pair
