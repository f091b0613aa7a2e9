"""The package itself: its version and the names that it gives on first use."""

from __future__ import annotations

import tomllib

import pytest
from support import ROOT

import sgg_fast


def test_the_version_is_said_once_and_cited():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {sgg_fast.__version__}\n" in cited
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_names_of_the_package_are_those_of_its_modules_and_others_are_refused():
    from sgg_fast import graph

    for name in sgg_fast.__all__:
        assert getattr(sgg_fast, name) is getattr(graph, name)
    with pytest.raises(AttributeError, match=r"module 'sgg_fast' has no attribute 'SceneGraf'"):
        sgg_fast.SceneGraf  # noqa: B018
