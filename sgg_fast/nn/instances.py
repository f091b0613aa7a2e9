"""Instance codes: random vectors that distinguish objects of the same name in one graph.

Two sheep of a graph have the same name embedding. The tokens of their triples differ only by their other relations, so
the UNet cannot see which triples share a sheep. A random code, equal in all triples of an object, shows it.
Letters: N objects, B graphs, L objects of the largest graph, K code width.
"""

from __future__ import annotations

import torch

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch

CODE_WIDTH = 16
"""K."""

STREAM_INSTANCE = 18
"""Word of the hash keys, distinct from those of `sgg_fast.diffusion.noise`."""

CodeKey = tuple[int, int | torch.Tensor, torch.Tensor]
"""Seed, step (an integer or [1]) and samples; graph b of a batch belongs to sample b modulo their number."""


def instance_codes(
    batch: SceneGraphBatch, masked_N: torch.Tensor | None = None, key: CodeKey | None = None
) -> torch.Tensor:
    """[N, K] unit normal codes of objects that share their name with another object of their graph; else 0.

    Without a key (inference) a code depends only on the object's index in its graph. Masked objects have no name: they
    get no code, and they do not count as another object of the same name.
    """
    graph_N = batch.object_graph.long()
    place_N = torch.arange(batch.num_objects, device=graph_N.device) - batch.object_ptr.long()[graph_N]
    name_N = batch.object_name.long()
    if masked_N is not None:
        name_N = torch.where(masked_N, -1 - place_N, name_N)
    longest = int(batch.sizes[:, 0].max())
    row_N = place_N.clamp(max=longest - 1)  # the padding graph may be longer in a captured step
    empty_BL = torch.full((batch.num_graphs, longest), -1 - batch.num_objects, device=graph_N.device)
    name_BL = empty_BL.index_put((graph_N, row_N), name_N)
    alike_N = (name_BL[graph_N] == name_N[:, None]).sum(dim=1)
    seed, step, sample_B = key or (0, 0, torch.zeros(1, dtype=torch.long, device=graph_N.device))
    words = (seed, step, sample_B[graph_N % len(sample_B)], STREAM_INSTANCE, place_N)
    return ops.hash_normal((CODE_WIDTH,), *words) * (alike_N > 1)[:, None]
