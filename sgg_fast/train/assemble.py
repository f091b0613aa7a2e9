"""Builds a stage from settings, models and data: the module that an engine steps.

The trainer, the warm-up, the planner and every benchmark build their stage here, so all of them run, plan and time the
same thing. `summary` reads from a stage how it was built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.config import SETTINGS, Config, ConfigError, ModelConfig
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import SceneGraph
from sgg_fast.nn import fuse, loading, lora
from sgg_fast.nn.attention import checkpoint_activations, set_attention
from sgg_fast.nn.backbone import Backbone
from sgg_fast.nn.clip import TextTowers
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.pipeline_parts import load_conditioner
from sgg_fast.nn.sgdiff import SGDiffConditioner
from sgg_fast.nn.text_baseline import TextConditioner, sentence
from sgg_fast.train.engines.base import resolved
from sgg_fast.train.optim import flat
from sgg_fast.train.stages import FinetuneStage, PretrainStage, Stage

Module = TypeVar("Module", bound=nn.Module)


def _encoder_settings(model: ModelConfig) -> dict[str, Any]:
    """Settings that a graph encoder is built with and stores."""
    return {name: getattr(model, setting.field) for name, setting in SETTINGS.items() if setting.rules.in_encoder}


def conditioner_of(
    model: ModelConfig, name_dim: int, image_dim: int, backbone: Backbone, names: Sequence[str] = ()
) -> Conditioner:
    """The conditioner of `--conditioner` with fresh weights; its statistics are not measured yet.

    names: strings that it is trained on.
    """
    widths: dict[str, Any] = {
        "image_dim": image_dim, "context_dim": backbone.context_dim, "pooled_dim": backbone.pooled_dim,
        "trained_names": tuple(names),
    }  # fmt: skip
    if model.conditioner == "text":
        return TextConditioner(**widths, form=model.text_form)
    if model.conditioner == "sgdiff":
        return SGDiffConditioner(**widths, width=model.width)
    return SceneGraphConditioner(name_dim=name_dim, **widths, **_encoder_settings(model))


def new_conditioner(
    model: ModelConfig, seed: int, foundation: Foundation, cache: TrainingCache, graphs: Sequence[SceneGraph] = ()
) -> Conditioner:
    """The conditioner with fresh weights (from the seed) and statistics measured on the cache.

    graphs: [S], those of the cache. For a baseline that reads text, the captions of these graphs go into `cache.texts`.
    """
    device = cache.names.device
    widths = cache.names.shape[1], cache.images.shape[1], foundation.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = conditioner_of(model, *widths, cache.table.names).to(device)
    conditioner.image_mean.copy_(torch.nn.functional.normalize(cache.images, dim=-1).mean(0))
    is_own = isinstance(conditioner, SceneGraphConditioner)
    towers = foundation.towers.to(device)
    conditioner.calibrate_null(towers.read([""])[0][0], foundation.empty_is_zero)
    if isinstance(conditioner, SceneGraphConditioner):
        conditioner.calibrate_names(cache.names, cache.graphs.object_name[cache.graphs.object_pooled.bool()])
        conditioner.calibrate_tokens(_vocabulary_rows(towers, cache.table.spoken()))
    elif conditioner.to_pooled is not None:
        conditioner.calibrate_pooled(_vocabulary_rows(towers, cache.table.spoken()))
    if model.conditioner == "text" and model.text_form != "phrases":
        sentences = [sentence(graph, model.text_form) for graph in graphs]
        cache.texts = towers.token_ids(sentences)
    if is_own and not model.reads_text:  # the text encoder is not needed again
        towers.to(torch.device("cpu"))
    return conditioner


MOST_CALIBRATED, _BATCH = 1 << 15, 256
"""Most names whose text states set the token norm, evenly spaced among all, and names read at once."""


def _vocabulary_rows(towers: TextTowers, names: Sequence[str]) -> torch.Tensor:
    """End-of-text rows of the names, or of `MOST_CALIBRATED` of them, [V, C + K]."""
    few = names[:: -(-len(names) // MOST_CALIBRATED)]
    return torch.cat([towers.read(few[first : first + _BATCH])[1] for first in range(0, len(few), _BATCH)])


def read_conditioner(folder: Path, model: ModelConfig) -> SceneGraphConditioner:
    """Load a pre-trained graph encoder. Raises `ConfigError` if it was built with other settings."""
    try:
        with loading.border(f"{folder}: not a graph encoder"):
            loading.check(folder)
            conditioner = load_conditioner(folder, "")
            if not isinstance(conditioner, SceneGraphConditioner):
                raise loading.ModelError("it is a baseline's")
    except loading.ModelError as error:
        raise ConfigError(str(error)) from error
    for name, asked in _encoder_settings(model).items():
        if conditioner.config[name] != asked:
            raise ConfigError(
                f"{folder} was pre-trained with {name} {conditioner.config[name]}, not {asked}; "
                "pre-train again or change the flag"
            )
    return conditioner


def fit_conditioner(
    conditioner: SceneGraphConditioner, foundation: Foundation, cache: TrainingCache
) -> SceneGraphConditioner:
    """Move a pre-trained graph encoder to the cache's device and add the cache's words to its vocabulary.

    Raises `ConfigError` if it was made for another CLIP or another Stable Diffusion.
    """
    widths = {
        "name_dim": ("CLIP names of width", cache.names.shape[1]),
        "image_dim": ("CLIP images of width", cache.images.shape[1]),
        "context_dim": ("a UNet of cross-attention width", foundation.backbone.context_dim),
        "pooled_dim": ("a UNet that reads a pooled text of width", foundation.backbone.pooled_dim),
    }
    for name, (what, width) in widths.items():
        was = conditioner.config.get(name, 0)
        if was != width:
            raise ConfigError(
                f"the graph encoder was pre-trained for {what} {was}, but --model and --clip have {width}; pre-train "
                "again with these models"
            )
    seen = dict.fromkeys([*conditioner.config.trained_names, *cache.table.names])
    conditioner.register_to_config(trained_names=tuple(seen))
    return conditioner.to(cache.names.device)


def assemble(
    config: Config,
    stage: str,
    foundation: Foundation,
    conditioner: Conditioner,
    cache: TrainingCache,
    device: torch.device,
    ds_config: Mapping[str, Any] | None = None,
    **checkpointing: Any,
) -> Stage:
    """The module of a stage on `device`: its data, adapters, attention, checkpointing, and fused or merged layers.

    Weights that the stage adds come from the seed. ds_config: the resolved DeepSpeed configuration. checkpointing:
    further options of `torch.utils.checkpoint.checkpoint`. Raises ValueError for an attention that cannot run here.
    """
    torch.manual_seed(config.run.seed)
    by_kernels = ops.backend_for(device, torch.float32) == "triton"
    config = resolved(config, stage, device, by_kernels, ds_config is not None)
    cache = cache.to(device)
    _move(conditioner, device)
    if stage == "pretrain":
        assert isinstance(conditioner, SceneGraphConditioner)
        return _move(PretrainStage(config, conditioner, cache), device)
    unet = foundation.unet
    called = called_models(config, foundation, cache)
    for model in (foundation.vae, foundation.clip, *foundation.text_encoders):
        _move(model, device if model in called else torch.device("cpu"))
    if config.optim.bf16_weights and ds_config is None:
        _narrow(unet, config.optim.weights == "split")
    if config.optim.lora:
        lora.add_adapters(unet, config.optim.lora, config.optim.lora_targets)
    set_attention(unet, config.model.attention, device, config.model.cross_attention)
    if config.model.gradient_checkpointing:
        checkpoint_activations(unet, **checkpointing)
    # ZeRO-3 gathers the weights of a layer when that layer is called.
    by_layer = ds_config is not None and ds_config["zero_optimization"]["stage"] == 3
    fuse.fuse_for(device, config.model.fuse_unet, unet, merge=not by_layer, stored=ds_config is not None)
    return _move(FinetuneStage(config, conditioner, foundation, cache), device)


def called_models(config: Config, foundation: Foundation, cache: TrainingCache) -> list[nn.Module]:
    """The frozen models that a fine-tuning step calls. The others lie in CPU memory until a sheet needs them."""
    called: list[nn.Module] = []
    if config.objective.image_embedding in ("predicted", "noisy-image"):
        called += [foundation.vae, foundation.clip]
    if cache.texts is not None:
        called += foundation.text_encoders
    return called


def _narrow(unet: nn.Module, split: bool) -> None:
    """Cast to bf16 where the UNet lies: the host casts what the device should never hold in fp32.

    split: every weight keeps its low half for the optimiser.
    """
    if split:
        flat.keep_low_halves(unet.parameters())
    if any(p.dtype != torch.bfloat16 for p in unet.parameters()):
        unet.bfloat16()


def _move(module: Module, device: torch.device) -> Module:
    """Move to the device if it lies elsewhere: the planner's weights have no memory and cannot be moved."""
    held = (*module.parameters(), *module.buffers())
    return module.to(device) if any(t.device.type != device.type for t in held) else module


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a stage was built, read from its modules and tensors."""

    fused: int
    """Modules of the UNet that run a fused kernel."""
    merged: int
    """GEMMs that serve several layers of the UNet."""
    attention: str
    """Classes of the UNet's attention processors. In pre-training it is "", and the fields above are 0."""
    checkpointed: bool
    """Whether the UNet's activations are recomputed in backward."""
    devices: frozenset[str]
    """Device types of the weights, the data and the frozen models that a step calls."""


def summary(stage: Stage) -> Summary:
    """Summarise a stage from `assemble`."""
    held: list[torch.Tensor] = [*stage.parameters(), *stage.buffers(), *stage.cache.tensors()]
    if not isinstance(stage, FinetuneStage):
        return Summary(0, 0, "", False, frozenset(t.device.type for t in held))
    foundation, unet = stage.foundation, stage.unet
    for model in called_models(stage.config, foundation, stage.cache):
        held += model.parameters()
    found = fuse.summary(unet)
    processors = {type(processor).__name__ for processor in unet.attn_processors.values()}
    return Summary(
        fused=sum(number for name, number in found.items() if name.startswith("Fused")),
        merged=found.get("GEMMs", 0),
        attention=" ".join(sorted(processors)),
        checkpointed=unet.is_gradient_checkpointing,
        devices=frozenset(t.device.type for t in held),
    )
