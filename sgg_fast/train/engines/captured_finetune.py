"""Fine-tuning replayed as CUDA graphs, by the rules of `replay.py`.

A step of one micro-batch is one graph: the drawn graphs packed into the worst case of their context length T, latents
gathered and noised, conditions dropped by hash, forward and backward through the UNet, the optimiser's few launches.
With accumulation three graphs serve any number of micro-batches: the first, whose backward writes the gradients; a
further one, whose backward adds to them; and the optimiser. Each T of the set has its own; nearly always it is 80.

What cannot be captured stays eager, and `why_eager` says why.
"""

from __future__ import annotations

import numpy as np
import torch

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import SceneGraphBatch
from sgg_fast.train.engines.base import resolve_precision
from sgg_fast.train.engines.buckets import Bucket, ContextBuckets
from sgg_fast.train.engines.captured import ReplayEngine
from sgg_fast.train.stages import FinetuneStage, Terms


def why_eager(config: Config, device: torch.device, cache: TrainingCache) -> str | None:
    """Why a fine-tuning step on this device, without DeepSpeed, is not captured; None where it is."""
    if resolve_precision(config, device) == "fp16":
        return "--precision fp16: the host changes the loss's scale"
    if config.optimizer_in_backward:
        return "--optimizer-in-backward: the host steps each weight"
    if not isinstance(cache.moments, torch.Tensor):
        return "the latents are read from disk, since they would take too much of the GPU's memory"
    if cache.texts is not None:
        return "SD's text encoder runs in each step"
    return None


class FinetuneReplay(ReplayEngine):
    """See the module. Activations may be checkpointed, since that keeps no generator's state."""

    module: FinetuneStage

    def __init__(self, module: FinetuneStage, config: Config, device: torch.device) -> None:
        super().__init__(module, config, "finetune", device, config.batch_size, config.accumulation_steps)
        self.buckets = ContextBuckets(module.cache.graphs.sizes, config.batch_size)

    @property
    def store(self) -> SceneGraphBatch:
        """See `ReplayEngine`."""
        return self.module.graphs

    def graphs_of(self, ids_B: np.ndarray, step: int) -> np.ndarray:
        """See `ReplayEngine`."""
        return self.module.drawn_graphs(ids_B, step)

    def bucket_of(self, ids_KB: np.ndarray) -> Bucket:
        """That of the samples' whole graphs, which are no smaller than what is drawn of them."""
        return self.buckets.of(ids_KB)

    def packed_terms(self, bucket: Bucket) -> Terms:
        """See `ReplayEngine`."""
        num = self.config.batch_size
        batch, _ = ops.pack_replayed(self.store, self._table, num, None, bucket=bucket.shape, bounds=bucket.bounds)
        with self._autocast():
            return self.module.terms(batch, self._table[0, :num].long(), self._table[3, :1])
