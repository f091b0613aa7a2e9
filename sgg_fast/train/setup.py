"""Everything between a `Config` and the first step: models, data, calibrated graph encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from sgg_fast.config import Config, ConfigError
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import SceneGraph
from sgg_fast.model_card import provenance
from sgg_fast.nn.clip import text_states, token_ids
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.conditioners import Baseline, Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.sgdiff import SGDiffConditioner
from sgg_fast.nn.text_baseline import TextConditioner, sentence
from sgg_fast.pipeline import SceneGraphToImagePipeline

logger = logging.getLogger(__name__)

_FIXED = (
    *("width", "num_layers", "encoder", "triple", "context", "token_init", "gate_init", "instance_codes"),
    "null_tokens",
)


def new_conditioner(config: Config, foundation: Foundation, cache: TrainingCache) -> SceneGraphConditioner:
    """A graph encoder with fresh weights (from the seed) and statistics measured on the cache."""
    device = cache.names.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        conditioner = SceneGraphConditioner(
            name_dim=cache.names.shape[1],
            image_dim=cache.images.shape[1],
            context_dim=foundation.unet.config.cross_attention_dim,
            width=config.width,
            num_layers=config.num_layers,
            encoder=config.encoder,
            triple=config.triple,
            context=config.context,
            token_init=config.token_init,
            gate_init=config.gate_init,
            instance_codes=config.instance_codes,
            null_tokens=config.null_tokens,
            trained_names=tuple(cache.table.names),
        ).to(device)
    is_object = cache.graphs.object_pooled.bool()
    conditioner.calibrate_names(cache.names, cache.graphs.object_name[is_object])
    unit = torch.nn.functional.normalize(cache.images, dim=-1)
    conditioner.image_mean.copy_(unit.mean(0))
    states, end = text_states(foundation.text_encoder.to(device), foundation.tokenizer, ["", *cache.table.spoken()])
    conditioner.calibrate_text(states[0], states[torch.arange(1, len(states)), end[1:]])
    if not config.reads_text:  # nothing reads it again
        foundation.text_encoder.to("cpu")
    return conditioner


def new_baseline(
    config: Config, foundation: Foundation, cache: TrainingCache, graphs: Sequence[SceneGraph]
) -> Baseline:
    """The conditioner that `--conditioner` names in SGG-IG's place, fresh from the seed; says the cache's graphs to it.

    graphs: [S], those of the cache.
    """
    device, names = cache.names.device, tuple(cache.table.names)
    widths = {"image_dim": cache.images.shape[1], "context_dim": foundation.unet.config.cross_attention_dim}
    widths["null_tokens"] = config.null_tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        conditioner: Baseline
        if config.conditioner == "text":
            conditioner = TextConditioner(**widths, form=config.text_form, trained_names=names)
        else:
            conditioner = SGDiffConditioner(**widths, width=config.width, trained_names=names)
    unit = torch.nn.functional.normalize(cache.images, dim=-1)
    conditioner.to(device).image_mean.copy_(unit.mean(0))
    conditioner.calibrate_text(text_states(foundation.text_encoder.to(device), foundation.tokenizer, [""])[0][0])
    if config.conditioner == "text" and config.text_form != "phrases":
        said = [sentence(graph, config.text_form) for graph in graphs]
        cache.texts = token_ids(foundation.tokenizer, said, device)
    return conditioner


def read_conditioner(folder: Path, config: Config) -> SceneGraphConditioner:
    """A pre-trained graph encoder. Raises `ConfigError` where it was built with other settings."""
    try:
        conditioner = SceneGraphConditioner.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: not a graph encoder: {str(error).strip().splitlines()[0]}") from error
    for name in _FIXED:
        if conditioner.config[name] != getattr(config, name):
            raise ConfigError(
                f"{folder} was pre-trained with {name} {conditioner.config[name]}, not {getattr(config, name)}; "
                "pre-train again or change the flag"
            )
    return conditioner


def fit_conditioner(
    conditioner: SceneGraphConditioner, foundation: Foundation, cache: TrainingCache
) -> SceneGraphConditioner:
    """A pre-trained graph encoder on the cache's device, the cache's words added to those it knows.

    Raises `ConfigError` where it was made for another CLIP or another Stable Diffusion.
    """
    widths = {
        "name_dim": ("CLIP names of width", cache.names.shape[1]),
        "image_dim": ("CLIP images of width", cache.images.shape[1]),
        "context_dim": ("a UNet of cross-attention width", foundation.unet.config.cross_attention_dim),
    }
    for name, (what, width) in widths.items():
        if conditioner.config[name] != width:
            raise ConfigError(
                f"the graph encoder was pre-trained for {what} {conditioner.config[name]}, but --model and --clip "
                f"have {width}; pre-train again with these models"
            )
    seen = dict.fromkeys([*conditioner.config.trained_names, *cache.table.names])
    conditioner.register_to_config(trained_names=tuple(seen))
    return conditioner.to(cache.names.device)


def make_pipeline(
    config: Config,
    foundation: Foundation,
    conditioner: Conditioner,
    with_text: bool = True,
) -> SceneGraphToImagePipeline:
    """The pipeline around the models as they are now (shared, not copied).

    Drawing needs no text encoder, and in training it may lie on another device: `with_text` False leaves it out,
    except where the tokens start from its states.
    """
    with_text = with_text or config.reads_text
    pipeline = SceneGraphToImagePipeline(
        vae=foundation.vae,
        text_encoder=foundation.text_encoder if with_text else None,
        tokenizer=foundation.tokenizer if with_text else None,
        unet=foundation.unet,
        scheduler=foundation.scheduler,
        graph_encoder=conditioner,
        graph_clip=foundation.clip,
        graph_tokenizer=foundation.clip_tokenizer,
        resolution=config.resolution,
        sampling_steps=config.sampling_steps,
        guidance=config.guidance,
        provenance=provenance(config, foundation.source),
    )
    pipeline.fuse_unet = config.fuse_unet
    return pipeline


class SampleOrder:
    """Which samples a process reads at a step: epoch after epoch, each a permutation from the seed.

    Process r of W reads positions (step W + r) B .. + B, so W processes with batch B read what one
    process reads with batch W B.
    """

    def __init__(self, num_samples: int, batch: int, seed: int, rank: int, world_size: int) -> None:
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.rank, self.world_size = rank, world_size
        self._epochs: dict[int, np.ndarray] = {}

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= number - 1}
            self._epochs[number] = np.random.default_rng([self.seed, number]).permutation(self.num_samples)
        return self._epochs[number]

    def at(self, step: int) -> np.ndarray:
        """[B] int64 sample ids of `step` (from 0)."""
        first = (step * self.world_size + self.rank) * self.batch
        epoch, place = np.divmod(np.arange(first, first + self.batch), self.num_samples)
        return np.concatenate([self._epoch(k)[place[epoch == k]] for k in range(epoch[0], epoch[-1] + 1)])
