"""Which attention the UNet runs; the only module that knows of xformers."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0


def set_attention(unet: UNet2DConditionModel, choice: str, device: torch.device) -> str:
    """Put `choice` ("auto", "xformers", "sdpa") into every attention layer; returns what was put.

    "auto" is xformers on CUDA where it is installed, else SDPA. Raises ValueError where an explicit
    request cannot be met.
    """
    wants_xformers = choice == "xformers" or (choice == "auto" and device.type == "cuda")
    if wants_xformers and device.type == "cuda":
        try:
            unet.enable_xformers_memory_efficient_attention()
            return "xformers"
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            if choice == "xformers":
                raise ValueError(f"--attention xformers: {str(error).splitlines()[0]}") from error
    elif choice == "xformers":
        raise ValueError("--attention xformers needs a CUDA device; use --attention sdpa here")
    unet.set_attn_processor(AttnProcessor2_0())
    return "sdpa"
