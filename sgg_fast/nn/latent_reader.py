"""A small network that predicts CLIP's image embedding from a predicted latent, for --image-embedding latent.

It replaces decoding and CLIP in every step. It has its own loss during the UNet's training and is dropped afterwards.
Letters: B images, c and h, w channels and sides of a latent, I width of image embeddings.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

WIDTHS = (64, 128, 256)
TIME_WIDTH = 64
_GROUPS = 8


class LatentReader(nn.Module):
    """(predicted z_0, timestep) -> image embedding, in the space of the centred image embeddings. Groups are
    normalised, because the noise of a prediction grows without bound as alpha_bar falls.
    """

    def __init__(self, latent_channels: int, image_dim: int) -> None:
        super().__init__()
        first, *_, last = WIDTHS
        self.conv_in = nn.Conv2d(latent_channels, first, 3, padding=1)
        self.time = nn.Linear(TIME_WIDTH, first)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(_GROUPS, a), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1))
            for a, b in itertools.pairwise(WIDTHS)
        )
        self.out = nn.Sequential(nn.GroupNorm(_GROUPS, last), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Linear(last, image_dim)

    def forward(self, z_0: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """z_0: [B, c, h, w], t: [B] -> [B, I]."""
        dtype = self.project.weight.dtype
        time_BF = self.time(get_timestep_embedding(t_B, TIME_WIDTH).to(dtype))
        x = self.conv_in(z_0.to(dtype)) + time_BF[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return self.project(self.out(x))


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the block gradients flow to the module's inputs, not to its weights."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
