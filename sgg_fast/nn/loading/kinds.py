"""Checks that models are of Stable Diffusion's kinds (v1, v2, SDXL base), by their configurations alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sgg_fast.graph import shown
from sgg_fast.nn.backbone import NUM_SIZES, Backbone

from .border import ModelError

PartConfig = Mapping[str, Any]

PREDICTIONS = ("epsilon", "v_prediction")
TEXT_LENGTH = 77
"""Tokens of CLIP's text context; the null condition has as many."""
_CONDITIONS = (
    "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type",
    "time_cond_proj_dim",
)  # fmt: skip
"""Settings of UNets with inputs beyond latents, time and text (depth, upscaling, guidance-distilled)."""
_SDXL, _READ = "text_time", "projection_class_embeddings_input_dim"
"""Value of addition_embed_type in SDXL's UNets, and their setting that holds the width of the text and the sizes."""


def check_class(config: PartConfig, key: str, allowed: tuple[str, ...]) -> None:
    """Raise `ModelError` unless `config[key]` is one of `allowed`."""
    found = config.get(key)
    if found not in allowed:
        fault = f"{key} is {shown(found)}" if key in config else f"does not say {key}"
        raise ModelError(f"{fault}; needed is {' or '.join(allowed)}")


def check_unet(config: PartConfig) -> None:
    """Raise `ModelError` unless the UNet maps latents to latents with text by cross-attention alone."""
    channels = _whole(config, "in_channels", 4), _whole(config, "out_channels", 4)
    if channels[0] != channels[1]:
        raise ModelError(
            f"a UNet of {channels[0]} input and {channels[1]} output channels (inpainting and the like); needed is "
            "one of text-to-image, such as Stable Diffusion v1.4's, with 4 and 4"
        )
    xl = config.get("addition_embed_type") == _SDXL
    known = ("addition_embed_type",) if xl else ()
    if more := next((key for key in _CONDITIONS if key not in known and config.get(key) is not None), None):
        raise ModelError(
            f"a UNet with a further condition ({more} is {shown(config[more])}); needed is one of Stable Diffusion "
            "v1's, v2's or SDXL base's kind, which reads latents, time and text"
        )
    _whole(config, "cross_attention_dim", 1280)
    if xl:
        read, each = (_whole(config, key, 0) for key in (_READ, "addition_time_embed_dim"))
        if read <= NUM_SIZES * each:
            raise ModelError(
                f"{_READ} is {read}, which leaves no text beside {NUM_SIZES} sizes of width {each}; needed is a UNet "
                "like SDXL base's"
            )


def check_vae(config: PartConfig) -> None:
    """Raise `ModelError` unless one number scales the VAE's latents."""
    _whole(config, "latent_channels", 4)
    factor = config.get("scaling_factor", 0.18215)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ModelError(f"scaling_factor must be a positive number, not {shown(factor)}")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ModelError(f"a VAE with {key}, which Stable Diffusion's kinds have not")


def check_scheduler(config: PartConfig) -> None:
    """Raise `ModelError` unless training and sampling support the schedule of alpha_bar and the prediction type."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ModelError(f"prediction_type is {shown(kind)}; {' and '.join(PREDICTIONS)} are supported")
    steps = _whole(config, "num_train_timesteps", 1000)
    if steps > 100_000:
        raise ModelError(f"num_train_timesteps is {steps}; at most 100000")


def check_text_tower(config: PartConfig) -> None:
    """Raise `ModelError` unless the text encoder can give the null condition (its states of "")."""
    length = _whole(config, "max_position_embeddings", TEXT_LENGTH)
    if length != TEXT_LENGTH:
        raise ModelError(f"a text tower of {length} tokens; needed is one of {TEXT_LENGTH}, as Stable Diffusion's")


def check_fit(unet: PartConfig, vae: PartConfig, texts: Sequence[PartConfig]) -> None:
    """Raise `ModelError` if the parts do not fit together. texts: the text encoders in order; none if not read."""
    latents, channels = _whole(vae, "latent_channels", 4), _whole(unet, "in_channels", 4)
    if latents != channels:
        raise ModelError(f"unet reads {channels} channels, but the latents of vae have {latents}")
    if not texts:
        return
    backbone, widths = Backbone.of(unet), [_whole(text, "hidden_size", 512) for text in texts]
    if sum(widths) != backbone.context_dim:
        named = " and ".join(("text_encoder", "text_encoder_2")[: len(texts)])
        raise ModelError(
            f"unet reads text states of width {backbone.context_dim}, but those of {named} have "
            f"{' + '.join(map(str, widths))}"
        )
    if backbone.pooled_dim and (width := _whole(texts[-1], "projection_dim", 512)) != backbone.pooled_dim:
        raise ModelError(
            f"unet reads a pooled text of width {backbone.pooled_dim} beside {NUM_SIZES} sizes, but text_encoder_2 "
            f"projects to {width} (SDXL's refiner is not supported)"
        )


def check_depth(config: PartConfig, num_tensors: int) -> None:
    """Raise `ModelError` for more layers than tensors in the weights, before the library builds these layers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_depth(value, num_tensors)
        counts = value if isinstance(value, (list, tuple)) else [value]
        if "layers" in key and any(isinstance(each, int) and each > num_tensors for each in counts):
            raise ModelError(f"{key} is {shown(value)}, but the weights have {num_tensors} tensors")


def _whole(config: PartConfig, key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{key} must be a whole number from 1, not {shown(value)}")
    return value
