"""From graphs to PNG files: finds the model, draws in batches, writes whole files only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from sgg_fast import env
from sgg_fast.graph import SceneGraph
from sgg_fast.pipeline import SceneGraphToImagePipeline

logger = logging.getLogger(__name__)

DEFAULT_RUN = Path("runs/toy")
_INSIDE = ("", "pipeline", "finetune/pipeline")


def find_pipeline(model: Path) -> Path | None:
    """The pipeline folder that `model` is or holds: itself, a stage's `pipeline`, or `finetune/pipeline` of a run."""
    return next((model / part for part in _INSIDE if (model / part / "model_index.json").is_file()), None)


def load_pipeline(model: str | None) -> tuple[SceneGraphToImagePipeline, str]:
    """A pipeline on this machine's device and one line that says what it is.

    Without `model`: the run in runs/toy if it was fine-tuned, else the toy models with random weights.
    Raises ValueError for a folder that holds no pipeline.
    """
    folder = find_pipeline(Path(model)) if model else find_pipeline(DEFAULT_RUN)
    if folder is not None:
        try:
            pipeline = SceneGraphToImagePipeline.from_pretrained(folder, use_safetensors=True)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"--model {folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        return pipeline.to(env.device()), str(folder)
    if model:
        raise ValueError(
            f"--model {model}: no pipeline there (model_index.json); give the folder of a finished "
            "train.py --stage finetune"
        )
    return (
        _untrained(),
        "toy models with RANDOM weights: textures, not scenes; train first (see README) or give --model",
    )


def _untrained() -> SceneGraphToImagePipeline:
    from sgg_fast.data.cache import build_cache
    from sgg_fast.data.sources import open_source
    from sgg_fast.recipes import recipe
    from sgg_fast.train.setup import make_pipeline, new_conditioner, open_foundation

    config = recipe("toy")
    foundation = open_foundation(config)
    cache = build_cache(open_source(config), foundation, torch.device("cpu"), with_latents=False, progress=False)
    conditioner = new_conditioner(config, foundation, cache)
    conditioner.register_to_config(trained_names=())
    return make_pipeline(config, foundation, conditioner).to(env.device())


def output_paths(out: Path, num_graphs: int) -> list[Path]:
    """`out` for one graph; `out` with -0, -1, ... before its ending for several. Raises ValueError if not a PNG."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png")
    if num_graphs == 1:
        return [out]
    width = len(str(num_graphs - 1))
    return [out.with_name(f"{out.stem}-{i:0{width}d}{out.suffix}") for i in range(num_graphs)]


def draw_graphs(
    pipeline: SceneGraphToImagePipeline,
    graphs: Sequence[SceneGraph],
    paths: Sequence[Path],
    steps: int,
    guidance: float,
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
            image.save(aside, format="PNG")
            aside.rename(path)
