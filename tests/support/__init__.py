"""Helpers that tests share; nothing here is collected."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

PUBLISHED = Path(os.environ.get("SGG_PUBLISHED", ROOT / "no-published-data"))
"""Folder of published annotations and graphs; tests that read them skip where `SGG_PUBLISHED` names none."""

DS_JSON = str(ROOT / "ds.json")
