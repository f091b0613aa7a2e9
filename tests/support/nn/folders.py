"""Model folders that are spoiled, and the line by which they are refused. The folder `base` has sd, clip, pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgg_fast.drawing.models import load_model
from sgg_fast.nn.foundation import load_foundation


def from_base(base: Path) -> None:
    load_foundation(str(base / "sd"), str(base / "clip"))


def from_pipeline(base: Path) -> None:
    load_model(str(base / "pipeline"))


def refused(load: Callable[[Path], Any], base: Path) -> str:
    """The one line of the ValueError that `load(base)` raises."""
    with pytest.raises(ValueError) as caught:
        load(base)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable()
    return said


def change(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; ... takes one away."""
    content = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write a safetensors file again after `change`."""
    save_file(change(load_file(path)), path, {"format": "pt"})
