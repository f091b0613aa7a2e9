"""Everything frozen, computed once: VAE moments, CLIP image embeddings, name embeddings, packed graphs.

The only part of `data/` that runs models. Lives in memory, on the training device. Letters: M images of the set,
I CLIP width, V names, c and h, w channels and sides of a latent.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from tqdm import tqdm

from sgg_fast.data.sources import PairSource
from sgg_fast.graph import NameTable, SceneGraphBatch
from sgg_fast.nn.clip import embed_images, embed_names, phrase_states
from sgg_fast.nn.foundation import Foundation


@dataclasses.dataclass
class TrainingCache:
    """A training set as the step reads it."""

    graphs: SceneGraphBatch
    """All M graphs, packed."""
    table: NameTable
    names: torch.Tensor
    """[V, I] raw CLIP embeddings of the table's strings."""
    images: torch.Tensor
    """[M, I] raw CLIP image embeddings."""
    moments: torch.Tensor | None
    """[M, 2c, h, w] mean and log-variance of the VAE posterior; None when only pre-training."""
    phrases: torch.Tensor | None = None
    """[P, C] SD's end-of-text state of each phrase of the table; None without text initialisation."""

    def __len__(self) -> int:
        return self.graphs.num_graphs

    def latents(self, index_B: torch.Tensor, noise_Bchw: torch.Tensor) -> torch.Tensor:
        """Samples of the posterior at `index`, unscaled: mean + std * noise."""
        assert self.moments is not None
        mean, logvar = self.moments[index_B].float().chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise_Bchw


def to_pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def build_cache(
    source: PairSource,
    foundation: Foundation,
    device: torch.device,
    with_latents: bool,
    with_phrases: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> TrainingCache:
    """Run the frozen towers over the whole set. The models are moved to `device` and stay there."""
    table = NameTable()
    graphs = SceneGraphBatch.from_graphs(source.graphs, table)
    clip, vae = foundation.clip.to(device), foundation.vae
    if with_latents:
        vae.to(device)
    images, moments = [], []
    starts = range(0, len(source), batch_size)
    for start in tqdm(starts, desc="encode images", unit="batch", disable=not progress, leave=False):
        stop = min(start + batch_size, len(source))
        pixels = to_pixels(np.stack([source.load_image(i) for i in range(start, stop)]), device)
        images.append(embed_images(clip, pixels))
        if with_latents:
            moments.append(vae.encode(pixels.to(vae.dtype)).latent_dist.parameters.float())
    return TrainingCache(
        graphs=graphs.to(device),
        table=table,
        names=embed_names(clip, foundation.clip_tokenizer, table.spoken()),
        images=torch.cat(images),
        moments=torch.cat(moments) if with_latents else None,
        phrases=phrase_states(foundation.text_encoder.to(device), foundation.tokenizer, table.phrases)
        if with_phrases
        else None,
    )
