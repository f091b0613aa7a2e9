"""Tiny runs of the real `Trainer`, and what they leave behind, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sgg_fast.config import Config, as_flags
from sgg_fast.recipes import recipe
from sgg_fast.train.trainer import Trainer

TINY: dict[str, Any] = {
    "width": 32,
    "num_layers": 2,
    "num_scenes": 8,
    "batch_size": 2,
    "pretrain_steps": 4,
    "finetune_steps": 4,
    "log_every": 1,
    "sample_every": 0,
    "checkpoint_every": 2,
    "num_samples": 2,
    "sheet_steps": 2,
    "sampling_steps": 4,
}
"""Fields of the toy recipe that make a step as cheap as it can be."""


def toy(**changes: Any) -> Config:
    """The toy recipe with the smallest graph encoder and no text in its tokens, for plans."""
    return recipe("toy", **{"width": 32, "num_layers": 1, "token_init": "none", "batch_size": 2, **changes})


def trainer(out: Path, stage: str, ds_path: str | None = None, **changes: Any) -> Trainer:
    """A trainer of the toy recipe with `TINY` settings."""
    overwrite, graph_encoder = changes.pop("overwrite", False), changes.pop("graph_encoder", None)
    return Trainer(recipe("toy", **{**TINY, **changes}), stage, out, ds_path, graph_encoder, overwrite)


def train(out: Path, stage: str, ds_path: str | None = None, **changes: Any) -> Path:
    """Run it; the folder of the result."""
    return trainer(out, stage, ds_path, **changes).train()


def flags(**changes: Any) -> list[str]:
    """`TINY` with changes, as flags of train.py."""
    return as_flags({**TINY, **changes})


def eval_flags(out: Path, **changes: object) -> list[str]:
    """Flags of a tiny evaluation: two graphs of the toy, one pair an axis, one step."""
    values = {"model": "toy", "num": 2, "pairs": 1, "steps": 1, "scheduler": "ddim", "out": out, **changes}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def lines(run: Path) -> list[dict[str, Any]]:
    """Every line of a stage's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def rows(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what was logged of it, without what depends on the clock."""
    clock = ("images_per_s", "remaining_s", "peak_memory_gib", "step")
    return {
        line["step"]: {k: v for k, v in line.items() if k not in clock} for line in lines(run) if "event" not in line
    }


def weights(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> tensors of every safetensors file below `folder`."""
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two results hold the same files with the same bits."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(
        left[file].keys() == right[file].keys() and all(left[file][k].equal(right[file][k]) for k in left[file])
        for file in left
    )
