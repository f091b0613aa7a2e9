"""Graph negatives for eq. 9: the sample's own graph with one wrong relation, which the loss pushes away from its image.

Negatives that are other images do not test who is left of whom; graph negatives test only that. One relation of the
graph is drawn. Either its predicate is replaced by its opposite, where the set has that word, or its subject and object
change places. All draws are hashes on the device. Letters: B samples, E relations, V names.
"""

from __future__ import annotations

import dataclasses

import torch

from sgg_fast import ops
from sgg_fast.diffusion.noise import STREAM_GRAPH_NEGATIVE
from sgg_fast.graph import NameTable, SceneGraphBatch

OPPOSITES = (
    ("left of", "right of"),
    ("to the left of", "to the right of"),
    ("above", "below"),
    ("over", "under"),
    ("inside", "surrounding"),
    ("in front of", "behind"),
    ("covering", "covered in"),
)

EITHER_WAY = (
    "and",
    "with",
    "by",
    "beside",
    "next to",
    "near",
    "close to",
    "adjacent to",
    "touching",
    "along",
    "against",
)
"""Symmetric predicates: they hold in both directions."""

_PICK, _KIND = 0, 1


class GraphNegatives:
    """Falsifies one relation of each graph."""

    def __init__(self, table: NameTable, device: torch.device) -> None:
        ids = {name: k for k, name in enumerate(table.names)}
        opposite = torch.full((len(table),), -1, dtype=torch.int32)
        for pair in OPPOSITES:
            if all(name in ids for name in pair):
                a, b = (ids[name] for name in pair)
                opposite[a], opposite[b] = b, a
        self.opposite_V = opposite.to(device)
        """Id of the predicate that says the opposite, or -1."""
        self.directed_V = torch.tensor([name not in EITHER_WAY for name in table.names], device=device)

    def falsify(
        self, batch: SceneGraphBatch, first: int, seed: int, step: int | torch.Tensor, sample_B: torch.Tensor
    ) -> tuple[SceneGraphBatch, torch.Tensor]:
        """`batch` with one wrong relation in each of the graphs `first` .. `first + B`, those of `sample` [B].

        Also returns [B] bool, which of them have a relation that can be made wrong; the others stay unchanged.
        """
        num, key = len(sample_B), (seed, step, sample_B, STREAM_GRAPH_NEGATIVE)
        graph_E = batch.relation_graph.long() - first
        own_E = (graph_E >= 0) & (graph_E < num)
        graph_E = graph_E.clamp(0, num - 1)
        usable_E = own_E & batch.relation_pooled.bool() & self.directed_V[batch.predicate_name]
        before = torch.nn.functional.pad(usable_E.long().cumsum(0), (1, 0))  # usable relations before each one
        at_B1 = before[batch.relation_ptr[first : first + num + 1].long()]
        count_B = at_B1.diff()
        picked_B = at_B1[:-1] + ops.hash_u32(*key, _PICK) % count_B.clamp(min=1)
        chosen_E = usable_E & (before[:-1] == picked_B[graph_E])
        flip_B = (ops.hash_u32(*key, _KIND) & 1).bool()
        opposite_E = self.opposite_V[batch.predicate_name]
        flipped_E = chosen_E & flip_B[graph_E] & (opposite_E >= 0)
        flipped = dataclasses.replace(batch, predicate_name=torch.where(flipped_E, opposite_E, batch.predicate_name))
        return ops.exchange_ends(flipped, chosen_E & ~flipped_E), count_B > 0
