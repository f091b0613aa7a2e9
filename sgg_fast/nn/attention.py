"""Which attention the UNet runs; the only module that knows of xformers."""

from __future__ import annotations

import logging

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

logger = logging.getLogger(__name__)


def set_attention(unet: UNet2DConditionModel, choice: str, device: torch.device) -> str:
    """Put `choice` ("auto", "xformers", "sdpa") into every attention layer; returns what was put, and logs why.

    "auto" is xformers on CUDA where it works, else SDPA. Raises ValueError where an explicit
    request cannot be met.
    """
    chosen, reason = "sdpa", "asked for" if choice == "sdpa" else f"{device.type} tensors"
    if choice == "xformers" and device.type != "cuda":
        raise ValueError("--attention xformers needs a CUDA device; use --attention sdpa here")
    if choice != "sdpa" and device.type == "cuda":
        try:
            unet.enable_xformers_memory_efficient_attention()
            chosen, reason = "xformers", "asked for" if choice == "xformers" else "CUDA tensors"
        except (ImportError, ValueError, NotImplementedError) as error:
            reason = f"xformers: {str(error).strip().splitlines()[0]}"
            if choice == "xformers":
                raise ValueError(f"--attention {reason}") from error
    if chosen == "sdpa":
        unet.set_attn_processor(AttnProcessor2_0())
    logger.info("UNet attention: %s (%s)", chosen, reason)
    return chosen
