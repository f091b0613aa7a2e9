"""The direction gate: whether the UNet's context for a relation depends on the relation's direction.

The other objectives do not enforce it: a graph encoder can learn that a dog and a house stand side by side and lose
which one is left. So the token of every directional relation is compared with the token of the same relation flipped
("right of") and of its subject and object exchanged. The unit is the spread of the tokens of that graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from sgg_fast.eval.relations import AXIS, flipped
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.clip import embed_names
from sgg_fast.pipeline import SceneGraphToImagePipeline

GATE = 0.1
"""Least move of a token by flipping and swapping, as a share of the spread."""


@dataclasses.dataclass(frozen=True)
class Direction:
    """Root mean square distance that a token moves, over the root mean square spread of its graph's tokens."""

    context_flipped: float
    """The token in the UNet's context, predicate flipped."""
    context_swapped: float
    """The token in the UNet's context, subject and object exchanged."""
    graph_flipped: float
    """The graph encoder's own token (before any text state is added), predicate flipped."""
    graph_swapped: float
    num_relations: int

    @property
    def passed(self) -> bool:
        """Whether all four are at least `GATE`; False if no relation was directional."""
        shares = (self.context_flipped, self.context_swapped, self.graph_flipped, self.graph_swapped)
        return all(share >= GATE for share in shares)


def measure_direction(pipeline: SceneGraphToImagePipeline, graphs: Sequence[SceneGraph]) -> Direction:
    """Measure every directional relation of `graphs`."""
    own, flips, swaps, places = [], [], [], []
    for graph in graphs:
        for k, (s, predicate, o) in enumerate(graph.relations):
            if predicate in AXIS:
                own.append(graph)
                flips.append(_with(graph, k, flipped((s, predicate, o))))
                swaps.append(_with(graph, k, (o, predicate, s)))
                places.append(k)
    if not own:
        return Direction(math.nan, math.nan, math.nan, math.nan, 0)
    shares: list[float] = []
    for reader in (_context_tokens, _graph_tokens):
        base = reader(pipeline, own)
        spread = torch.stack([(t - t.mean(dim=0)).square().sum(dim=1).mean() for t in base]).mean()
        for others in (flips, swaps):
            moved = [
                (a[k] - b[k]).square().sum() for a, b, k in zip(base, reader(pipeline, others), places, strict=True)
            ]
            shares.append(float((torch.stack(moved).mean() / spread).sqrt()))
    context_flipped, context_swapped, graph_flipped, graph_swapped = shares
    return Direction(context_flipped, context_swapped, graph_flipped, graph_swapped, len(own))


def _with(graph: SceneGraph, k: int, relation: tuple[int, str, int]) -> SceneGraph:
    relations = list(graph.relations)
    relations[k] = relation
    return SceneGraph(graph.objects, tuple(relations))


@torch.no_grad()
def _context_tokens(pipeline: SceneGraphToImagePipeline, graphs: Sequence[SceneGraph]) -> list[torch.Tensor]:
    """Per graph [relations + objects, C]: the triples' tokens in the context, in the graph's order."""
    context, *_ = pipeline.encode_graphs(graphs, guided=False)
    return [c[2 : 2 + len(g.relations) + len(g.objects)].float() for c, g in zip(context, graphs, strict=True)]


@torch.no_grad()
def _graph_tokens(pipeline: SceneGraphToImagePipeline, graphs: Sequence[SceneGraph]) -> list[torch.Tensor]:
    """The tokens of `_context_tokens` from the graph encoder alone."""
    encoder, table = pipeline.graph_encoder, NameTable()
    batch = SceneGraphBatch.from_graphs(graphs, table).to(pipeline.device)
    names = encoder.standardise(embed_names(pipeline.graph_clip, pipeline.graph_tokenizer, table.spoken()))
    _, tokens_EC, _ = encoder.encode(names, batch)
    return list(encoder.token_norm(tokens_EC).float().split(batch.sizes[:, 1].tolist()))
