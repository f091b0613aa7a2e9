"""docs/RELIABILITY.md and SECURITY.md name a test for each promise: there is such a test."""

from __future__ import annotations

import re

import pytest
from support import ROOT


@pytest.mark.parametrize("page", ["docs/RELIABILITY.md", "SECURITY.md"])
def test_every_test_that_a_page_names_exists(page):
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 6
    assert [name for name in named if f"def {name}(" not in sources] == []
    for file in re.findall(r"`(tests/[\w./]+)`", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file
