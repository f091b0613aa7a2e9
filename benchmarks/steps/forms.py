"""Names and settings of the measured forms of a step, and the size of one. It does not load torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRETRAIN = ("naive", "cached", "kernels", "graphs")

DS_JSON = str(Path(__file__).parents[2] / "ds.json")
FINETUNE: dict[str, tuple[dict[str, Any], str | None]] = {
    "captured": ({}, None),
    "captured-master": ({"weights": "master"}, None),
    "captured-lean": ({"weights": "lean"}, None),
    "plain": ({"cuda_graphs": False}, None),
    "plain-unfused": ({"cuda_graphs": False, "fuse_unet": "off"}, None),
    "lean": ({"weights": "lean", "cuda_graphs": False}, None),
    "lean-in-backward": ({"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0}, None),
    "ds.json": ({}, DS_JSON),
    "diffusers-adamw": ({"attention": "sdpa"}, "adamw"),
    "diffusers-8bit-xformers": ({"attention": "xformers"}, "adamw8bit"),
    "diffusers-reduce-overhead": ({"attention": "sdpa", "compile": "reduce-overhead"}, "adamw"),
    "diffusers-max-autotune": ({"attention": "sdpa", "compile": "max-autotune"}, "adamw"),
}
"""Name -> changed settings, and the ds.json or the recipe's optimiser."""


def compiles(name: str) -> bool:
    """Whether torch.compile works for minutes before a form of fine-tuning runs."""
    return "compile" in FINETUNE[name][0]


NEEDS = {
    "ds.json": ("deepspeed", "bitsandbytes"),
    "diffusers-8bit-xformers": ("bitsandbytes", "xformers"),
}
"""Packages that a form of fine-tuning requires."""

SAMPLING = ("captured", "fused", "eager", "diffusers", "compiled", "diffusers-compiled", "diffusers-max-autotune")
"""Those that compile for minutes come last."""
QUICK_SAMPLING = SAMPLING[:4]


@dataclasses.dataclass(frozen=True)
class Size:
    """Resolution and batch of a step."""

    resolution: int
    batch: int

    def __str__(self) -> str:
        return f"{self.resolution}x{self.resolution} b{self.batch}"


def sizes(resolutions: Sequence[int], batches: Sequence[int]) -> list[Size]:
    """Every resolution with every batch, by the number of pixels."""
    return sorted((Size(r, b) for r in resolutions for b in batches), key=lambda size: size.resolution**2 * size.batch)
