"""Finds and loads the pipeline to draw with: a run of train.py, a folder, a hub id, or the shipped model."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch

from sgg_fast import digests, env
from sgg_fast.data.png_record import SHIPPED_NAME
from sgg_fast.drawing.options import SCHEDULERS
from sgg_fast.nn import loading, lora
from sgg_fast.nn.pipeline_parts import PARTS, TOY_BASE, WORDS_BASE, load_pipeline_parts, named_base
from sgg_fast.pipeline import SceneGraphToImagePipeline

DEFAULT_RUN = Path("runs/toy")
SHIPPED = Path(__file__).parents[1] / "toy" / "pipeline"
"""SGG-IG on the world `toy-words`, trained by the commands in `sgg_fast/toy/build.py`; fp16 on disk."""
_INSIDE = ("", "pipeline", "finetune/pipeline")

_AS_SD_RUNS_IT = {"pndm": {"skip_prk_steps": True}}
"""Settings that the pipeline's own scheduler does not have."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A pipeline on this machine's device, and its identity."""

    pipeline: SceneGraphToImagePipeline
    name: str
    """Value of --model that finds it again."""
    description: str
    weights: str
    """Hash of all files that drawing reads, configurations, tokenizers and scheduler included."""
    notice: str = ""
    """Message about a model that was chosen by default."""


def find_pipeline(model: Path) -> Path | None:
    """The pipeline folder that `model` is or holds: itself, a stage's `pipeline`, or `finetune/pipeline` of a run."""
    return next((model / part for part in _INSIDE if (model / part / "model_index.json").is_file()), None)


def load_model(model: str | None, verify: bool = False, base: str | None = None) -> Model:
    """Load the model that --model names: a run, a pipeline folder, "toy" (the shipped one) or a hub id.

    Without `model` it is the run in runs/toy if that was fine-tuned, else the shipped toy model. On CUDA its UNet
    computes in fp16. Adapters are merged into the weights. verify: compare every byte with its SHA-256, even if that
    was done before. base: place of the base of a LoRA, if it is not where the LoRA says. Raises ValueError for a folder
    that holds no pipeline.
    """
    if verify:
        os.environ[digests.VERIFY] = "1"
    if model is None:
        folder = find_pipeline(DEFAULT_RUN) or SHIPPED
    elif model == SHIPPED_NAME and not Path(model).exists():
        folder = SHIPPED
    else:
        folder = find_pipeline(Path(model)) or _downloaded(model)
    if folder == SHIPPED:
        name, description = SHIPPED_NAME, "the toy model of this package"
    else:
        name, description = model or str(DEFAULT_RUN), str(folder)
    by_default = model is None and folder != SHIPPED
    notice = f"--model {SHIPPED_NAME} is the one that ships, trained for hours" if by_default else ""
    pipeline, device = _load(folder, base), env.device()
    if lora.has_adapters(pipeline.unet):  # as part of the weights they cost no launch
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    pipeline.keep_conditions = True
    if device.type == "cuda":
        pipeline.unet.to(torch.float16)  # only the UNet runs at every step; latents and VAE stay in fp32
    return Model(pipeline.to(device), name, description, _fingerprint(folder, base), notice)


def _load(folder: Path, base: str | None) -> SceneGraphToImagePipeline:
    with loading.border(f"--model {folder}: cannot be loaded"):
        given: dict[str, Any] = {}
        named = None if base is not None else named_base(folder)
        if named in ({"model": TOY_BASE, "clip": ""}, {"model": WORDS_BASE, "clip": ""}):
            from sgg_fast.toy.models import toy_foundation

            given = toy_foundation(wide=named["model"] == WORDS_BASE).pipeline_parts()
        return SceneGraphToImagePipeline(**given | load_pipeline_parts(folder, given, base))


def _downloaded(model: str) -> Path:
    """The cached folder of a hub id (owner/name)."""
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"--model {model}: no pipeline there (model_index.json); give the folder of a finished fine-tuning run"
        )
    return loading.find_folder("--model", model, ("", *PARTS))


def _fingerprint(folder: Path, base: str | None) -> str:
    """A hash of all files that drawing reads, configurations, tokenizers and scheduler included.

    base: folder of a LoRA's base, if it is not where the LoRA says. A hub id counts by its name alone.
    """
    with loading.border(f"--model {folder}"):
        own, named = loading.digest(folder), named_base(folder)
        place = base or (named or {}).get("model", "")
        if not place:
            return own
        of_base = loading.digest(Path(place)) if Path(place).is_dir() else place
        return hashlib.sha256(f"{own} {of_base}".encode()).hexdigest()[:32]


def made_scheduler(pipeline: SceneGraphToImagePipeline, name: str) -> Any:
    """The scheduler of this short name with the pipeline's own settings. Raises ValueError if they do not suit it."""
    if name == scheduler_name(pipeline):
        return pipeline.scheduler
    kind = getattr(importlib.import_module("diffusers"), SCHEDULERS[name])
    with loading.border(f"--scheduler {name}: cannot be made of this model's {type(pipeline.scheduler).__name__}"):
        return kind.from_config(pipeline.scheduler.config, **_AS_SD_RUNS_IT.get(name, {}))


def scheduler_name(pipeline: SceneGraphToImagePipeline) -> str:
    """The short name of the pipeline's scheduler, or its class if it has none."""
    kind = type(pipeline.scheduler).__name__
    return next((short for short, long in SCHEDULERS.items() if long == kind), kind)
