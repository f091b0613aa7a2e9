"""Models and data of the right sizes with random contents, for the planner's traces and for benchmarks.

Only configuration files are downloaded, and no weight is read. Under a `FakeTensorMode` nothing is allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sgg_fast.config import Config, ConfigError, ModelConfig
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn import loading
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation, load_sd_configs
from sgg_fast.train.assemble import conditioner_of
from sgg_fast.train.memory.sizes import PUBLISHED, Sizes

LARGEST_GRAPH = (30, 30)
"""Objects and relations of the largest graphs that the published sets keep."""


def blank_foundation(model: ModelConfig) -> Foundation:
    """The models with random weights, without tokenizers.

    Sizes come from the config.json of --model and --clip, from the toy's models where they stand in, else from the
    published model that the recipe is for (`sizes.PUBLISHED`).
    Raises `ConfigError` for a --model whose configuration cannot be read.
    """
    if model.sizes not in PUBLISHED and not model.source:
        from sgg_fast.toy import models as toy

        wide = model.sizes == "toy-words"
        clip = toy.toy_clip(toy.toy_tokenizer(toy.SPOKEN_TOKENIZER if wide else toy.TOKENIZER))
        unet, text = toy.toy_unet(wide), CLIPTextModel(clip.config.text_config)
        return _foundation("toy sizes", unet, toy.toy_vae(), [text], toy.toy_scheduler(), clip)
    if not model.source:
        found, clip_config = PUBLISHED[model.sizes], CLIPConfig()
        source = f"{found.name} sizes"
    else:
        found, clip_config = _read_sizes(model)
        source = found.name
    towers = zip((CLIPTextModel, CLIPTextModelWithProjection), found.texts, strict=False)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return _foundation(
        source,
        UNet2DConditionModel.from_config(found.unet),
        AutoencoderKL.from_config(found.vae),
        [kind(CLIPTextConfig.from_dict(text)) for kind, text in towers],
        DDIMScheduler(**betas, clip_sample=False, prediction_type=found.prediction),
        CLIPModel(clip_config),
    )


def _foundation(source: str, *parts: Any) -> Foundation:
    unet, vae, texts, scheduler, clip = parts
    text_encoder, text_encoder_2 = [*texts, None][:2]
    return Foundation(unet, vae, text_encoder, None, scheduler, clip, None, source, text_encoder_2).freeze()


def _read_sizes(given: ModelConfig) -> tuple[Sizes, CLIPConfig]:
    """Configurations of --model, and of --clip or the CLIP that --model holds."""
    model, parts = given.source, ("unet", "vae", "text_encoder", "text_encoder_2", "graph_clip")
    try:
        root = loading.find_folder("--model", model, parts, ends=("json",))
        with loading.border(f"--model {model}: its configuration cannot be read"):
            unet, vae, texts = load_sd_configs(root)
        clip, at, part = f"--clip {given.clip}", root, "graph_clip"
        if given.clip:
            at, part = loading.find_folder("--clip", given.clip, ("",), ends=("json",)), ""
        with loading.border(f"{clip if given.clip else model}: its configuration cannot be read"):
            known = given.clip or (root / part).is_dir()
            own = loading.load_config(at, part, lambda _: None, "model_type", "clip") if known else {}
            return Sizes(model, unet, vae, tuple(texts)), CLIPConfig.from_dict(own)
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
    clip, side = foundation.clip.config.projection_dim, config.data.resolution // foundation.latent_factor
    row, reads_sizes = foundation.backbone.row_dim, foundation.backbone.pooled_dim > 0
    return TrainingCache(
        graphs=graphs,
        table=table,
        names=torch.randn(len(table), clip),
        images=torch.randn(num_images, clip),
        moments=torch.randn(num_images, 2 * foundation.vae.config.latent_channels, side, side).half(),
        phrases=torch.randn(len(table.phrases), row).half() if config.model.token_init == "text" else None,
        boxes=torch.rand(graphs.num_objects, 4) if config.objective.needs_boxes("finetune") else None,
        sizes=torch.zeros(num_images, 4) if reads_sizes else None,
    )


def blank_conditioner(model: ModelConfig, foundation: Foundation) -> Conditioner:
    """The conditioner with random weights, at the widths of the models."""
    clip = foundation.clip.config.projection_dim
    return conditioner_of(model, clip, clip, foundation.backbone)
