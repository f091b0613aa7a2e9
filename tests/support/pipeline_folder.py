"""A whole pipeline as we export it, around the small Stable Diffusion and CLIP of `sd_folder`."""

from __future__ import annotations

from pathlib import Path

import torch

from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.pipeline import SceneGraphToImagePipeline
from support.sd_folder import CLIP_WIDTH, CONTEXT, write_clip, write_sd


def write_pipeline(folder: Path) -> Path:
    """`folder`/pipeline, sealed; the base models lie beside it in sd and clip."""
    foundation = load_foundation(str(write_sd(folder / "sd")), str(write_clip(folder / "clip")))
    torch.manual_seed(2)
    encoder = SceneGraphConditioner(
        name_dim=CLIP_WIDTH, image_dim=CLIP_WIDTH, context_dim=CONTEXT, width=16, num_layers=1, token_init="text",
        trained_names=("__image__", "__in_image__", "sheep", "grass", "above"),
    )  # fmt: skip
    SceneGraphToImagePipeline(
        vae=foundation.vae, text_encoder=foundation.text_encoder, tokenizer=foundation.tokenizer, unet=foundation.unet,
        scheduler=foundation.scheduler, graph_encoder=encoder, graph_clip=foundation.clip,
        graph_tokenizer=foundation.clip_tokenizer, resolution=64, sampling_steps=2, guidance=3.0,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"
