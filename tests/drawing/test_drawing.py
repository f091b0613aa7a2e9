"""Drawing as a package: the example in its documentation runs, and its names are those of its modules."""

from __future__ import annotations

import doctest

import pytest

import sgg_fast.drawing


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(sgg_fast.drawing, raise_on_error=True).attempted == 5
    assert len(list(tmp_path.rglob("*.png"))) == 2, "the picture, and before beside after"


def test_names_of_the_package_come_from_its_modules_and_others_are_refused():
    from sgg_fast.drawing import jobs, models

    assert sgg_fast.drawing.load_model is models.load_model and sgg_fast.drawing.draw_grid is jobs.draw_grid
    assert all(hasattr(sgg_fast.drawing, name) for name in sgg_fast.drawing.__all__)
    with pytest.raises(AttributeError, match=r"module 'sgg_fast\.drawing' has no attribute 'draw_jabs'"):
        sgg_fast.drawing.draw_jabs  # noqa: B018
