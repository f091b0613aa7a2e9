"""From graphs to PNG files: finds the model, draws in batches, writes whole files only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from sgg_fast import env
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.foundation import missing_file
from sgg_fast.pipeline import SceneGraphToImagePipeline

DEFAULT_RUN = Path("runs/toy")
SHIPPED = Path(__file__).parent / "toy" / "pipeline"
"""SGG-IG on the toy world, trained by the commands in `sgg_fast/toy/build.py`; fp16 on disk."""
_INSIDE = ("", "pipeline", "finetune/pipeline")


def find_pipeline(model: Path) -> Path | None:
    """The pipeline folder that `model` is or holds: itself, a stage's `pipeline`, or `finetune/pipeline` of a run."""
    return next((model / part for part in _INSIDE if (model / part / "model_index.json").is_file()), None)


def load_pipeline(model: str | None) -> tuple[SceneGraphToImagePipeline, str]:
    """A pipeline on this machine's device and one line that says what it is.

    Without `model`: the run in runs/toy if it was fine-tuned, else the toy model that the package ships.
    Raises ValueError for a folder that holds no pipeline.
    """
    folder = find_pipeline(Path(model)) if model else find_pipeline(DEFAULT_RUN) or SHIPPED
    if folder is not None:
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
            if lacking := missing_file(folder, parts):
                raise ValueError(f"the folder lacks {lacking}")
            pipeline = SceneGraphToImagePipeline.from_pretrained(
                folder, use_safetensors=True, torch_dtype=torch.float32
            )
        except (OSError, ValueError, AttributeError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(f"--model {folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        return pipeline.to(env.device()), "the toy model of this package" if folder == SHIPPED else str(folder)
    raise ValueError(
        f"--model {model}: no pipeline there (model_index.json); give the folder of a finished fine-tuning run"
    )


def check_settings(steps: int | None, guidance: float | None, seed: int, size: int | None) -> None:
    """Raises ValueError that names the flag."""
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be at least 1, not {steps}")
    if guidance is not None and not 1 <= guidance < math.inf:
        raise ValueError(f"--guidance must be a number from 1 (none), not {guidance}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must lie between 0 and 2^63 - 1, not {seed}")
    if size is not None and (size < 8 or size % 8):
        raise ValueError(f"--size must be a multiple of 8, not {size}")


def output_paths(out: Path, num_graphs: int) -> list[Path]:
    """`out` for one graph; `out` with -0, -1, ... before its ending for several.

    Raises ValueError if it is not a PNG or cannot be written to, before anything is drawn.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png")
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {nearest} is not a folder that can be written to")
    width = len(str(num_graphs - 1))
    paths = [out.with_name(f"{out.stem}-{i:0{width}d}{out.suffix}") for i in range(num_graphs)]
    paths = [out] if num_graphs == 1 else paths
    if folder := next((path for path in paths if path.is_dir()), None):
        raise ValueError(f"--out {folder}: is a folder")
    return paths


def draw_graphs(
    pipeline: SceneGraphToImagePipeline,
    graphs: Sequence[SceneGraph],
    paths: Sequence[Path],
    steps: int | None,
    guidance: float | None,
    seed: int,
    resolution: int | None = None,
    batch_size: int = 8,
) -> None:
    """One picture a graph, all from the same noise; each file appears whole or not at all."""
    for start in range(0, len(graphs), batch_size):
        some = graphs[start : start + batch_size]
        images = pipeline(
            some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for _ in some],
            resolution=resolution,
        ).images
        for image, path in zip(images, paths[start:], strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.part")
            try:
                image.save(aside, format="PNG")
                aside.rename(path)
            finally:
                aside.unlink(missing_ok=True)
