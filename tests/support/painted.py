"""What infer.py draws and what a PNG carries, to hold the page's pictures against."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def by_infer(folder: Path, graph: dict, **settings: Any) -> bytes:
    """The PNG that `infer.py --model toy` writes of a graph."""
    import infer

    source, out = folder / "graph.json", folder / "picture.png"
    source.write_text(json.dumps(graph))
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(source), "--model", "toy", "--out", str(out), "--quiet", "--overwrite", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        assert infer.main(command) == 0
    return out.read_bytes()


def record_of(data: bytes) -> dict:
    """The record inside a PNG."""
    with Image.open(io.BytesIO(data)) as image:
        return json.loads(image.text["sgg_fast"])
