"""A tiny comparison that is killed and goes on, run once for all tests of this folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock
from support.cases.benchmark import SYSTEM, TINY

from benchmarks.quality import (
    __main__ as quality,
)
from benchmarks.quality import (
    cells as quality_cells,
)
from benchmarks.quality import (
    plan as quality_plan,
)
from benchmarks.quality import (
    tables as quality_tables,
)
from sgg_fast.eval import evaluate
from sgg_fast.toy import parts


class Cut(BaseException):
    """A run that is killed."""


@pytest.fixture(scope="session")
def words_foundation(tmp_path_factory) -> Path:
    """A foundation of `toy-words` with random weights."""
    folder = tmp_path_factory.mktemp("foundation")
    parts.assemble(folder, folder / "foundation")
    return folder / "foundation"


@pytest.fixture(scope="session")
def compared(words_foundation, tmp_path_factory) -> tuple[Path, dict[str, dict[str, int]]]:
    """Two cells, cut after the first had finished and while the second was evaluated; then the same command again.

    The folder, and the times of its files after the "first" and the "last" command. Made once, also under pytest -n.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    out, seen = base / "quality", base / "quality.json"
    with FileLock(base / "quality.lock"):
        if not seen.is_file():
            seen.write_text(json.dumps(_compare(out, words_foundation)))
    return out, json.loads(seen.read_text())


def _compare(out: Path, model: Path) -> dict[str, dict[str, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NUM_ACCURACY", 2)
        for module in (quality_cells, quality_tables):
            patch.setattr(module, "GRAPHS", "toy-words")
        small = {"width": 32, "num_layers": 1, "log_every": 1}
        patch.setattr(quality_cells, "COMMON", {**quality_cells.COMMON, **small})
        patch.setattr(quality_plan, "chosen", lambda only: [SYSTEM["text, zero-shot"], SYSTEM["sgg"]])
        quality_plan.store(out, "1h", TINY, {"model": str(model), "precision": "auto"})
        words = ["--out", str(out), "--seeds", "1", "--only", "table1", "--results", str(out / "results")]
        words += ["--model", str(model)]
        compare = evaluate.measure_direction

        def cut(*_: object) -> None:
            raise Cut

        patch.setattr(evaluate, "measure_direction", cut)  # only SGG-IG comes by there, its pictures drawn
        with pytest.raises(Cut):
            quality.main(words)
        first = _times(out)
        patch.setattr(evaluate, "measure_direction", compare)
        assert quality.main(words) == 0
    return {"first": first, "last": _times(out)}


def _times(out: Path) -> dict[str, int]:
    kinds = ("*.png", "eval.json", "*.safetensors")
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for kind in kinds for p in out.rglob(kind)}
