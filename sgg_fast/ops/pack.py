"""Drawing a batch from the packed store of a whole data set."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from sgg_kernels import reference

from sgg_fast.graph import SceneGraphBatch


def mae_mask(
    batch: SceneGraphBatch, masked_B: torch.Tensor, sample_B: torch.Tensor, ratio: float, seed: int, step: int
) -> torch.Tensor:
    """[N] bool: the objects that the auto-encoder hides in the graphs with masked_B ([B] bool) set.

    sample: [B] ids that enter the hash with seed and step. `round(ratio * objects)` of a graph's objects, at least
    one masked and one kept, never the image node; a graph of one object is left whole. Raises ValueError for a
    ratio outside 0..1.

    Equivalent PyTorch: `hash(seed, step, sample, index)` ranked within each graph, the lowest masked
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"mae_mask: the ratio must lie between 0 and 1, not {ratio}")
    return reference.mae_mask(batch.object_ptr, masked_B, sample_B, ratio, seed, step)


def pack(store: SceneGraphBatch, graph_ids: np.ndarray) -> SceneGraphBatch:
    """The graphs `graph_ids` ([B] host integers, repeats allowed) of `store`, end to end, on the store's device.

    Raises ValueError for an empty list or an id out of range.

    Equivalent PyTorch: `SceneGraphBatch.from_graphs([graphs[i] for i in graph_ids], table)`
    """
    ids = np.asarray(graph_ids, dtype=np.int64)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= store.num_graphs:
        raise ValueError(f"pack: graph ids must lie in 0..{store.num_graphs - 1} and there must be at least one")
    tensors = {f.name: getattr(store, f.name) for f in dataclasses.fields(store) if f.name != "sizes"}
    packed = reference.pack(tensors, torch.from_numpy(ids).to(store.object_ptr.device))
    return SceneGraphBatch(**packed, sizes=store.sizes[ids])
