"""The outputs of a run: sample sheets during training, the result at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sgg_fast import ops
from sgg_fast.config import Config, ConfigError, RunConfig, flag
from sgg_fast.data.sources import PairSource
from sgg_fast.diffusion import limits
from sgg_fast.files import replace_folder
from sgg_fast.model_card import SHEET, provenance
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.loading import forget_places, seal
from sgg_fast.nn.pipeline_parts import TOY_BASE, WORDS_BASE
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.train.run.folder import writing


def make_pipeline(
    config: Config,
    foundation: Foundation,
    conditioner: Conditioner,
    with_text: bool = True,
    figures: dict[str, float] | None = None,
) -> SceneGraphToImagePipeline:
    """The pipeline around the current models (shared, not copied).

    with_text: include the text encoders. Sampling does not need it, and in training it may lie on another device. False
    leaves it out, unless the tokens start from its states. figures: numbers of the training for the model card.
    """
    with_text = with_text or config.model.reads_text
    left_out = {} if with_text else dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = SceneGraphToImagePipeline(
        **foundation.pipeline_parts() | left_out,
        graph_encoder=conditioner,
        resolution=config.data.resolution,
        sampling_steps=config.run.sampling_steps,
        guidance=config.run.guidance,
        provenance=provenance(config, foundation.source, figures=figures),
        force_zeros_for_empty_prompt=foundation.empty_is_zero,
    )
    pipeline.fuse_unet = config.model.fuse_unet
    return pipeline


def check_steps(run: RunConfig, scheduler: Any) -> None:
    """Raise `ConfigError` for more steps than the model's scheduler can take, before they are needed."""
    asked = {"sampling_steps": run.sampling_steps}
    if run.sample_every and run.num_samples:
        asked["sheet_steps"] = run.sheet_steps
    for name, num_steps in asked.items():
        if refusal := limits.refusal(scheduler, num_steps):
            raise ConfigError(f"--{flag(name)} {num_steps}: {refusal}")


@contextlib.contextmanager
def _frozen_on(pipeline: SceneGraphToImagePipeline, device: torch.device, all_of_them: bool) -> Iterator[None]:
    """Context in which frozen models of the pipeline lie on `device`; afterwards each is where it was.

    all_of_them: else the text encoder alone, whose states go into the tokens.
    """
    homes: dict[nn.Module, torch.device] = {}
    texts = (pipeline.text_encoder, pipeline.text_encoder_2)
    for model in (*texts, *((pipeline.vae, pipeline.graph_clip) if all_of_them else ())):
        if model is not None and (home := next(model.parameters()).device) != device:
            homes[model] = home
            model.to(device)
    try:
        yield
    finally:
        for model, home in homes.items():
            model.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def draw_sheet(
    pipeline: SceneGraphToImagePipeline, run: RunConfig, source: PairSource, device: torch.device
) -> Image.Image:
    """Real pictures of the first graphs above, generated ones of the same graphs below.

    They are drawn one at a time: beside a training run, memory is scarcer than time. Raises `NotFiniteError` for a
    picture with NaN or Inf.
    """
    num = min(run.num_samples, len(source))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.capture_unet = "off"  # few steps; DeepSpeed's hooks gather weights at every call
    pipeline.unet.eval()
    drawn = []
    try:
        with _frozen_on(pipeline, device, run.sheet_device == "auto"):
            of_vae = next(pipeline.vae.parameters()).device
            for i, graph in enumerate(source.graphs[:num]):
                latents = pipeline(
                    graph,
                    num_inference_steps=run.sheet_steps,
                    guidance_scale=run.guidance,
                    generator=torch.Generator().manual_seed(run.seed + i),
                    output_type="latent",
                ).images
                elsewhere = of_vae != latents.device  # where our kernels may not run
                with ops.assumed("reference") if elsewhere else contextlib.nullcontext():
                    drawn.append(pipeline.decode(latents.to(of_vae))[0])
    finally:
        pipeline.unet.train()
    side = pipeline.config.resolution
    sheet = Image.new("RGB", (num * side, 2 * side))
    for i, image in enumerate(drawn):
        sheet.paste(Image.fromarray(source.load_image(i)), (i * side, 0))
        sheet.paste(image, (i * side, side))
    return sheet


def lora_base(config: Config) -> dict[str, str] | None:
    """The base that a LoRA result names: --model and --clip, folders as absolute paths; None without --lora.

    Without --model the base is one of the toy's foundations.
    """
    if not config.optim.lora:
        return None
    own = WORDS_BASE if config.model.sizes == "toy-words" else TOY_BASE
    places = {"model": config.model.source or own, "clip": config.model.clip}
    return {name: os.path.abspath(place) if place and Path(place).is_dir() else place for name, place in places.items()}


def export(
    result: Path,
    model: Conditioner | SceneGraphToImagePipeline,
    base: dict[str, str] | None = None,
    sheet: Path | None = None,
) -> None:
    """Write a stage's result to a temporary folder and rename it: complete or absent. Raises OSError on failure.

    base: of a LoRA result (`lora_base`), which consists of the adapters and the graph encoder.
    sheet: picture of samples for the model card.
    """
    aside = result.with_name(f".{result.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    with writing(result):
        aside.mkdir(parents=True)
        if sheet is not None:
            shutil.copyfile(sheet, aside / SHEET)
        if base is not None:
            assert isinstance(model, SceneGraphToImagePipeline)
            model.save_lora(aside, base)
        else:
            model.save_pretrained(aside)
        if not isinstance(model, SceneGraphToImagePipeline):  # the pipeline does this itself
            forget_places(aside)
            seal(aside)
        replace_folder(aside, result)
