"""The plan of every form beside the memory that the stand-in measured, which `memory.csv` holds; needs no device."""

from __future__ import annotations

import pytest

from . import memory

MEASURED = memory.read_rows()
OVER_PLANNED = ("lean in backward, 4-bit state", "256")
"""Segments of this row are planned 4 % higher than the allocator takes; blocks are not."""


def test_every_form_is_measured():
    found = [(row["form"], row["resolution"], row["batch"]) for row in MEASURED]
    assert {(form, "512", "2") for form in memory.TRAINING_FORMS} <= set(found)
    assert len(set(found)) == len(found) and {row["device"] for row in MEASURED} == {"stand-in"}


@pytest.mark.slow
@pytest.mark.parametrize("measured", MEASURED, ids=lambda row: f"{row['form']} {row['resolution']}")
def test_the_plan_is_what_was_measured(measured):
    """Blocks in use and segments taken, within `memory.SHARE` of the plan as it is now."""
    plan = memory.planned(measured["form"], int(measured["resolution"]), int(measured["batch"]))
    row, share = memory.beside(measured, plan), 100 * memory.SHARE
    assert abs(float(row["off_percent"])) <= share, plan.lines()
    over = (measured["form"], measured["resolution"]) == OVER_PLANNED
    assert -share * (1 + over) <= float(row["off_reserved_percent"]) <= share, plan.lines()
