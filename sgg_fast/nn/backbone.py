"""What a UNet reads besides latents, time and context, from its configuration: Stable Diffusion v1, v2 or SDXL base.

All code that depends on the family asks here, so that a folder decides and no flag. v1 and v2 differ in widths and in
the scheduler's prediction type alone, which the parts' own configurations give. SDXL also reads a pooled text vector
and six numbers about the picture's size (Podell et al., 2023, SDXL, section 2.2). Letters: B images, C context width,
K width of the pooled vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

NUM_SIZES = 6
"""Numbers about a picture's size that SDXL base reads (its refiner reads five)."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A UNet's family and the widths of its conditions."""

    name: str
    """For messages: "Stable Diffusion v1", "Stable Diffusion v2" or "SDXL"."""
    context_dim: int
    """C."""
    pooled_dim: int = 0
    """K; 0 for a UNet that reads no pooled vector and no sizes."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Backbone:
        """The backbone of a UNet's configuration that `loading.kinds.check_unet` accepts."""
        context_dim = config.get("cross_attention_dim", 1280)
        if config.get("addition_embed_type") == "text_time":
            sizes = NUM_SIZES * config["addition_time_embed_dim"]
            return cls("SDXL", context_dim, config["projection_class_embeddings_input_dim"] - sizes)
        version = 2 if config.get("use_linear_projection") else 1
        return cls(f"Stable Diffusion v{version}", context_dim)

    @property
    def num_towers(self) -> int:
        """Text encoders: one, or SDXL's two."""
        return 2 if self.pooled_dim else 1

    @property
    def row_dim(self) -> int:
        """Width of a row of `clip.TextTowers`: a text state, and the pooled state of its text behind it."""
        return self.context_dim + self.pooled_dim

    def sizes(
        self,
        height: int,
        width: int,
        num_images: int,
        device: torch.device | str,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        """[B, 6] fp32: original height and width, top and left of the crop, target height and width, in pixels.

        By default, as in diffusers, a picture is its own original.
        """
        (from_height, from_width), (top, left) = original or (height, width), crop
        sizes = [from_height, from_width, top, left, height, width]
        return torch.tensor(sizes, dtype=torch.float32, device=device).expand(num_images, -1)


def added(pooled_BK: torch.Tensor | None, sizes_B6: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
    """`added_cond_kwargs` of a UNet's call; None for v1 and v2."""
    if pooled_BK is None or sizes_B6 is None:
        return None
    return {"text_embeds": pooled_BK, "time_ids": sizes_B6}
