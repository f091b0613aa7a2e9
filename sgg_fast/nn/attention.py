"""Which attention the UNet runs; the only module that knows of xformers and cuDNN."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


class CudnnAttnProcessor(AttnProcessor2_0):
    """SDPA that prefers cuDNN's kernel. What that one cannot take (fp32, in sample sheets) runs on the others."""

    ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the parent's."""
        with sdpa_kernel(list(self.ORDER), set_priority=True):
            return super().__call__(*args, **kwargs)


def _probe_cudnn(device: torch.device) -> None:
    """Raises RuntimeError where cuDNN cannot attend with a token mask, forward or backward, at SD's head width."""
    q = torch.zeros(1, 8, 64, 40, dtype=torch.bfloat16, device=device, requires_grad=True)
    k = torch.zeros(1, 8, 80, 40, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(1, 1, 1, 80, dtype=torch.bfloat16, device=device).expand(1, 8, 64, 80)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, k, k, bias).sum().backward()


def set_attention(unet: UNet2DConditionModel, choice: str, device: torch.device) -> str:
    """Put `choice` into every attention layer; returns what was put, and logs why.

    choice: "xformers", "sdpa", "cudnn", or "auto", which is xformers on CUDA where it works, else SDPA. Raises
    ValueError where an explicit request cannot be met.
    """
    if choice in ("xformers", "cudnn") and device.type != "cuda":
        raise ValueError(f"--attention {choice} needs a CUDA device; use --attention sdpa here")
    chosen, reason = "sdpa", f"{device.type} tensors" if choice == "auto" else "asked for"
    if choice == "xformers" or (choice == "auto" and device.type == "cuda"):
        try:
            unet.enable_xformers_memory_efficient_attention()
            chosen, reason = "xformers", "asked for" if choice == "xformers" else "CUDA tensors"
        except (ImportError, ValueError, NotImplementedError) as error:
            reason = f"xformers: {str(error).strip().splitlines()[0]}"
            if choice == "xformers":
                raise ValueError(f"--attention {reason}") from error
    if choice == "cudnn":
        try:
            _probe_cudnn(device)
        except RuntimeError as error:
            raise ValueError(f"--attention cudnn: {str(error).strip().splitlines()[0]}; use sdpa") from error
        chosen = "cudnn"
    if chosen != "xformers":
        unet.set_attn_processor(CudnnAttnProcessor() if chosen == "cudnn" else AttnProcessor2_0())
    logger.info("UNet attention: %s (%s)", chosen, reason)
    return chosen


def checkpoint_activations(unet: UNet2DConditionModel, **options: Any) -> None:
    """Recompute each block in backward. Nothing in the UNet is random, so no generator state is kept for it.

    options: further ones of `torch.utils.checkpoint.checkpoint`.
    """
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, **options)
    unet.enable_gradient_checkpointing(recompute)
