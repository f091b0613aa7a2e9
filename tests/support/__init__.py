"""Helpers that tests share; nothing here is collected."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

PUBLISHED = Path(os.environ.get("SGG_PUBLISHED") or "$SGG_PUBLISHED")
"""Folder of published annotations and graphs. Where the variable is not set there is no such folder: tests that read it
skip, and the reason has its name."""

DS_JSON = str(ROOT / "ds.json")


def _is_pinned(package: str) -> bool:
    """Whether the installed version is that of constraints.txt."""
    pin = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return pin is not None and importlib.metadata.version(package).partition("+")[0] == pin[1]


pinned = pytest.mark.skipif(
    not (_is_pinned("torch") and _is_pinned("triton")), reason="holds for the torch and Triton of constraints.txt"
)
"""Marks a test of what one version of torch launches or of Triton compiles."""
