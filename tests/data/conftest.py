"""A small prepared set, its cache, and the toy's models, which most tests here read; made once, never changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_sets import cache_of, write_small

from sgg_fast.nn.foundation import Foundation
from sgg_fast.toy.models import toy_foundation


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="session")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache_of(data, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def foundation() -> Foundation:
    return toy_foundation()
