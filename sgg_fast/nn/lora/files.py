"""Reads and writes adapters in diffusers' file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin

from sgg_fast.nn import loading

logger = logging.getLogger(__name__)

WEIGHTS = "pytorch_lora_weights.safetensors"
"""Name of diffusers' file."""


def save_adapters(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters to `folder`/`WEIGHTS` under diffusers' names."""
    from peft import get_peft_model_state_dict

    layers = {name: tensor.float().contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def load_adapters(unet: UNet2DConditionModel, source: Any, adapter_name: str | None = None, **options: Any) -> None:
    """Put the adapters of `source` beside the UNet's layers, as diffusers' `load_lora_weights` does.

    source: a folder, a file, a hub id or a state dict. options: of diffusers' `lora_state_dict`. Adapters of text
    encoders are left out, with a warning. Raises `ModelError`.
    """
    mixin = StableDiffusionLoraLoaderMixin
    with loading.border("adapters"):
        if not isinstance(source, dict) and Path(source).is_dir() and "weight_name" not in options:
            loading.check_file(Path(source) / WEIGHTS)
            options["weight_name"] = WEIGHTS
        state, alphas, metadata = mixin.lora_state_dict(
            source, unet_config=unet.config, return_lora_metadata=True, use_safetensors=True, **options
        )
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{mixin.unet_name}.")}
        if not own or not all("lora" in name for name in own):
            raise loading.ModelError("holds no adapters of a UNet")
        if len(own) < len(state):
            logger.warning("%d adapter weights are not the UNet's and are left out", len(state) - len(own))
        mixin.load_lora_into_unet(own, network_alphas=alphas, unet=unet, adapter_name=adapter_name, metadata=metadata)
