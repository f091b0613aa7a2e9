"""Inputs and fixtures that tests share with `test_vg.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.vg_files import SAMPLE

real = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no {SAMPLE}")


def sample_root(folder: Path, splits: dict[str, list[int]]) -> Path:
    """The sample's files, linked, beside alias files and splits of ours."""
    folder.mkdir()
    for path in SAMPLE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "object_alias.txt").write_text("tree,trees\nwindow,windows\nbuilding,buildings\n")
    (folder / "relationship_alias.txt").write_text("on,on top of\nhas,has a\n")
    (folder / "vg_splits.json").write_text(json.dumps(splits))
    return folder
