"""Shared by the tests of the toy: its foundation, and a world that hundreds of scenes are drawn of at once."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from sgg_fast.nn.foundation import Foundation
from sgg_fast.toy import world
from sgg_fast.toy.models import toy_foundation


@pytest.fixture(scope="session")
def foundation() -> Foundation:
    """The shipped one; read only."""
    return toy_foundation()


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each world repeats its first eight scenes."""
    drawn = functools.cache(world.draw_scene)

    def draw_scene(seed: int, index: int, *size: int, **kind: Any) -> world.Scene:
        return drawn(seed, index % 8, *size, **kind)

    monkeypatch.setattr(world, "draw_scene", draw_scene)
