"""Fixtures of the doctor's tests."""

from __future__ import annotations

import pytest

from sgg_fast import env


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    """A record of each test's own, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    env._record.cache_clear()
    yield
    env._record.cache_clear()
