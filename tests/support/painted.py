"""What infer.py draws and what a PNG carries, to hold the page's pictures against."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def by_infer(folder: Path, graph: dict, **settings: Any) -> list[bytes]:
    """The PNGs that `infer.py --model toy` writes of a graph."""
    import infer

    source, out = folder / "graph.json", folder / "picture.png"
    source.write_text(json.dumps(graph))
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert infer.main([str(source), "--model", "toy", "--out", str(out), "--quiet", "--overwrite", *flags]) == 0
    return [Path(line).read_bytes() for line in printed.getvalue().splitlines()]


def record_of(data: bytes) -> dict:
    """The record inside a PNG."""
    with Image.open(io.BytesIO(data)) as image:
        return json.loads(image.text["sgg_fast"])
