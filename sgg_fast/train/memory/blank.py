"""Models and data of the right sizes with random contents, for the planner's traces and for benchmarks.

Only configuration files are downloaded, and no weight is read. Under a `FakeTensorMode` nothing is allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from sgg_fast.config import Config, ConfigError, ModelConfig
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn import loading
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation, load_sd_configs
from sgg_fast.train.assemble import conditioner_of

SD_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
"""Stable Diffusion v1.4's UNet where it differs from diffusers' defaults: 859 520 964 parameters."""

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


def blank_foundation(model: ModelConfig) -> Foundation:
    """The models with random weights, without tokenizers.

    Sizes come from the config.json of --model and --clip, from the toy's models where they stand in, else from SD v1.4.
    Raises `ConfigError` for a --model whose configuration cannot be read.
    """
    if model.sizes != "sd" and not model.source:
        from sgg_fast.toy import models as toy

        clip = toy.toy_clip(toy.toy_tokenizer())
        unet, text = toy.toy_unet(wide=model.sizes == "toy-words"), CLIPTextModel(clip.config.text_config)
        return _foundation("toy sizes", unet, toy.toy_vae(), text, toy.toy_scheduler(), clip)
    if not model.source:
        sizes = SD_UNET, SD_VAE, CLIPTextConfig(**SD_TEXT), CLIPConfig()
        source = "Stable Diffusion v1.4 sizes"
    else:
        sizes, source = _read_sizes(model), model.source
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


def _read_sizes(given: ModelConfig) -> tuple[dict[str, Any], dict[str, Any], CLIPTextConfig, CLIPConfig]:
    model, parts = given.source, ("unet", "vae", "text_encoder", "graph_clip")
    try:
        root = loading.find_folder("--model", model, parts, ends=("json",))
        with loading.border(f"--model {model}: its configuration cannot be read"):
            unet, vae, text = load_sd_configs(root)
        clip, at, part = f"--clip {given.clip}", root, "graph_clip"
        if given.clip:
            at, part = loading.find_folder("--clip", given.clip, ("",), ends=("json",)), ""
        with loading.border(f"{clip if given.clip else model}: its configuration cannot be read"):
            known = given.clip or (root / part).is_dir()
            own = loading.load_config(at, part, lambda _: None, "model_type", "clip") if known else {}
            return unet, vae, CLIPTextConfig.from_dict(text), CLIPConfig.from_dict(own)
    except loading.ModelError as error:
        raise ConfigError(str(error)) from error


def largest_graph() -> SceneGraph:
    """A graph of the largest size."""
    num_objects, num_relations = LARGEST_GRAPH
    names = tuple(f"name {i}" for i in range(num_objects))
    return SceneGraph(names, tuple((i % num_objects, "by", (i + 1) % num_objects) for i in range(num_relations)))


def blank_cache(config: Config, foundation: Foundation, num_images: int) -> TrainingCache:
    """A training set of `num_images` random images, each with a graph of the largest size, on the CPU."""
    table = NameTable()
    graphs = SceneGraphBatch.from_graphs([largest_graph()] * num_images, table)
    clip, side = foundation.clip.config.projection_dim, config.data.resolution // latent_factor(foundation)
    context = foundation.unet.config.cross_attention_dim
    return TrainingCache(
        graphs=graphs,
        table=table,
        names=torch.randn(len(table), clip),
        images=torch.randn(num_images, clip),
        moments=torch.randn(num_images, 2 * foundation.vae.config.latent_channels, side, side).half(),
        phrases=torch.randn(len(table.phrases), context).half() if config.model.token_init == "text" else None,
        boxes=torch.rand(graphs.num_objects, 4) if config.objective.needs_boxes("finetune") else None,
    )


def blank_conditioner(model: ModelConfig, foundation: Foundation) -> Conditioner:
    """The conditioner with random weights, at the widths of the models."""
    clip = foundation.clip.config.projection_dim
    return conditioner_of(model, clip, clip, foundation.unet.config.cross_attention_dim)


def latent_factor(foundation: Foundation) -> int:
    """Width in pixels of one latent."""
    return 2 ** (len(foundation.vae.config.block_out_channels) - 1)
