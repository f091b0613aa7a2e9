"""Sizes of the published models, where they differ from the defaults of diffusers and transformers.

Sources: the config.json files of CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1 and
stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""The autoencoder of all three, 83 653 863 parameters."""
_VIT_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
"""Text tower of CLIP ViT-L/14, 123 060 480 parameters."""
_VIT_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
"""Text tower of OpenCLIP ViT-H/14 without its last layer, 340 387 840 parameters."""
_VIT_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
"""Text tower of OpenCLIP ViT-bigG/14 with its projection, 694 659 840 parameters."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Configurations of a published model's parts."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    prediction: str = "epsilon"
    resolution: int = 512
    """Width and height of the pictures that it was trained with last."""


SD14 = Sizes("Stable Diffusion v1.4", {"sample_size": 64, "cross_attention_dim": 768}, _VAE, (_VIT_L,))
"""UNet of 859 520 964 parameters."""
SD21 = Sizes(
    "Stable Diffusion v2.1",
    {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),  # the numbers of heads: their width is 64
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    _VAE,
    (_VIT_H,),
    "v_prediction",
    768,
)
"""UNet of 865 910 724 parameters."""
SDXL = Sizes(
    "SDXL base 1.0",
    {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
    (_VIT_L, _VIT_BIG_G),
    resolution=1024,
)
"""UNet of 2 567 463 684 parameters."""

PUBLISHED = {"sd": SD14, "sd21": SD21, "sdxl": SDXL}
"""Value of the recipes' `sizes` -> sizes."""
