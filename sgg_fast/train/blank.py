"""Models and data by their sizes alone: what planning (`plan.py`) traces and what benchmarks fill with random weights.

Nothing is downloaded but configuration files, and no weight is read. Under a `FakeTensorMode` nothing is allocated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from sgg_fast.config import Config, ConfigError
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import Foundation

SD_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
"""Stable Diffusion v1.4's UNet: 859 520 964 parameters."""

SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""Its autoencoder: 83 653 863 parameters."""

SD_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
"""Its text encoder, the text tower of CLIP ViT-L/14: 123 060 480 parameters."""

LARGEST_GRAPH = (30, 30)
"""Objects and relations of the largest graphs that the published sets keep."""

NUM_IMAGES = {"vg": 62_565, "coco": 24_972}
"""Training images of the published sets, by the first letters of their recipes."""


def blank_foundation(config: Config) -> Foundation:
    """The models of `config` with random weights. Sizes: --model's and --clip's config.json, the toy's, or SD v1.4's.

    There are no tokenizers. Raises `ConfigError` for a --model whose configuration cannot be read.
    """
    if config.recipe in ("toy", "toy-words") and not config.model:
        from sgg_fast.toy import models as toy

        clip = toy.toy_clip(toy.toy_tokenizer())
        unet, text = toy.toy_unet(wide=config.recipe == "toy-words"), CLIPTextModel(clip.config.text_config)
        return _foundation("toy sizes", unet, toy.toy_vae(), text, toy.toy_scheduler(), clip)
    if not config.model:
        sizes = SD_UNET, SD_VAE, CLIPTextConfig(**SD_TEXT), CLIPConfig()
        source = "Stable Diffusion v1.4 sizes"
    else:
        sizes, source = _read_sizes(config), config.model
    unet_config, vae_config, text_config, clip_config = sizes
    return _foundation(
        source,
        UNet2DConditionModel.from_config(unet_config),
        AutoencoderKL.from_config(vae_config),
        CLIPTextModel(text_config),
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        CLIPModel(clip_config),
    )


def _foundation(source: str, *parts: Any) -> Foundation:
    unet, vae, text_encoder, scheduler, clip = parts
    return Foundation(unet, vae, text_encoder, None, scheduler, clip, None, source).freeze()


def _read_sizes(config: Config) -> tuple[dict[str, Any], dict[str, Any], CLIPTextConfig, CLIPConfig]:
    model, clip, folder = config.model, config.clip, ""
    if not clip and (Path(model) / "graph_clip").is_dir():
        clip, folder = model, "graph_clip"
    try:
        return (
            dict(UNet2DConditionModel.load_config(model, subfolder="unet")),
            dict(AutoencoderKL.load_config(model, subfolder="vae")),
            CLIPTextConfig.from_pretrained(model, subfolder="text_encoder"),
            CLIPConfig.from_pretrained(clip, subfolder=folder) if clip else CLIPConfig(),
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--model {model}: its configuration cannot be read: {reason}") from error


def blank_cache(config: Config, foundation: Foundation, num_images: int) -> TrainingCache:
    """A training set of `num_images` random images, each with a graph of the largest size, on the CPU."""
    num_objects, num_relations = LARGEST_GRAPH
    names = [f"name {i}" for i in range(num_objects)]
    relations = [(i % num_objects, "by", (i + 1) % num_objects) for i in range(num_relations)]
    graph, table = SceneGraph(tuple(names), tuple(relations)), NameTable()
    graphs = SceneGraphBatch.from_graphs([graph] * num_images, table)
    clip, side = foundation.clip.config.projection_dim, config.resolution // latent_factor(foundation)
    context = foundation.unet.config.cross_attention_dim
    return TrainingCache(
        graphs=graphs,
        table=table,
        names=torch.randn(len(table), clip),
        images=torch.randn(num_images, clip),
        moments=torch.randn(num_images, 2 * foundation.vae.config.latent_channels, side, side),
        phrases=torch.randn(len(table.phrases), context).half() if config.token_init == "text" else None,
        boxes=torch.rand(graphs.num_objects, 4) if config.needs_boxes("finetune") else None,
    )


def blank_conditioner(config: Config, foundation: Foundation) -> SceneGraphConditioner:
    """A graph encoder of the models' widths with random weights."""
    clip = foundation.clip.config.projection_dim
    return SceneGraphConditioner(
        name_dim=clip,
        image_dim=clip,
        context_dim=foundation.unet.config.cross_attention_dim,
        width=config.width,
        num_layers=config.num_layers,
        encoder=config.encoder,
        triple=config.triple,
        context=config.context,
        token_init=config.token_init,
        instance_codes=config.instance_codes,
        null_tokens=config.null_tokens,
    )


def latent_factor(foundation: Foundation) -> int:
    """Pixels a latent is wide."""
    return 2 ** (len(foundation.vae.config.block_out_channels) - 1)
