"""The features for distribution metrics of toy pictures: a small network trained only for this.

It predicts which category is in each of 4 x 4 cells. It has no part in drawing, training or judging, so no model was
ever optimised for its features. Letters: B pictures, D width of the features.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sgg_fast.data.cache import to_pixels
from sgg_fast.nn.loading import load_weights
from sgg_fast.toy.detector import CATEGORIES, Targets, draw_targets
from sgg_fast.toy.fit import fit
from sgg_fast.toy.models import WEIGHTS
from sgg_fast.toy.world import HELD_OUT_SEED, TRAIN_SEED

WIDTH = 64
"""D."""
CELLS = 4


class ToyFeatures(nn.Module):
    """Strided convolutions from 64 x 64 pixels to 4 x 4 cells; features are the mean over the cells."""

    name = "toy features (64-d, sgg_fast/toy/features.py)"

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (12, 32, 48, 64, WIDTH)
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if k == 0 else 2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU())
        self.head = nn.Conv2d(WIDTH, len(CATEGORIES), 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, 64, 64] in -1..1 to the cells' activations [B, D, 4, 4]."""
        return self.body(functional.pixel_unshuffle(pixels, 2))

    @torch.no_grad()
    def read(self, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """Features, float64 [B, D], of uint8 pictures [B, 64, 64, 3]."""
        parts = [
            self(to_pixels(images[start : start + batch_size])).mean(dim=(2, 3)).double().numpy()
            for start in range(0, len(images), batch_size)
        ]
        return np.concatenate(parts)


def load_features(path: Path = WEIGHTS / "features.safetensors") -> ToyFeatures:
    """The trained network. Raises ValueError if its weights are missing or have another shape."""
    network = ToyFeatures()
    load_weights(path, network, "train it by `python -m sgg_fast.toy.build features`")
    return network.requires_grad_(False).eval()


def _cells(targets: Targets, chosen: np.ndarray) -> torch.Tensor:
    """1 where a cell shows a category, float [B, K, 4, 4]."""
    category = torch.from_numpy(targets.category[chosen]).long()
    hot = functional.one_hot(category, len(CATEGORIES)).permute(0, 3, 1, 2).float()
    return functional.adaptive_max_pool2d(hot, CELLS)


def train_features(out: Path, num_steps: int, num_scenes: int) -> nn.Module:
    """The network's moving average after `num_steps`; continues from `out` if possible. Logs held-out accuracy."""
    targets, held_out = draw_targets(TRAIN_SEED, num_scenes), draw_targets(HELD_OUT_SEED, 200)
    torch.manual_seed(1)
    network = ToyFeatures()

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = np.random.default_rng([TRAIN_SEED, step]).integers(num_scenes, size=32)
        logits = network.head(network(to_pixels(targets.images[chosen])))
        loss = functional.binary_cross_entropy_with_logits(logits, _cells(targets, chosen))
        return loss, {"loss": float(loss.detach())}

    @torch.no_grad()
    def look(ema: nn.Module, step: int) -> str:
        assert isinstance(ema, ToyFeatures)
        there = _cells(held_out, np.arange(200)) > 0
        predicted = ema.head(ema(to_pixels(held_out.images))) > 0
        shared = (there & predicted).sum()
        return f"cells: precision {shared / predicted.sum():.3f}, recall {shared / there.sum():.3f}"

    return fit("features", network, loss_of, out / "features", num_steps, peak_lr=2e-3, ema_decay=0.998, look=look)
