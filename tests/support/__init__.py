"""Helpers that tests share; nothing here is collected."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

PUBLISHED = Path(os.environ.get("SGG_PUBLISHED") or "$SGG_PUBLISHED")
"""Folder of published annotations and graphs. Where the variable is not set there is no such folder: tests that read it
skip, and the reason has its name."""

DS_JSON = str(ROOT / "ds.json")
