"""Inputs and fixtures that tests share with `test_graph_negatives.py`."""

from __future__ import annotations

from sgg_fast.diffusion.noise import STREAM_GRAPH_NEGATIVE
from sgg_fast.graph import SceneGraph
from sgg_fast.train.graph_negatives import EITHER_WAY, OPPOSITES
from support import loops


def told_wrongly(graph: SceneGraph, words: set[str], seed: int, step: int, sample: int) -> SceneGraph | None:
    """The graph negative of a sample; None where no relation can be told wrongly."""
    opposite = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1]) if a in words and b in words}
    usable = [k for k, (_, said, _) in enumerate(graph.relations) if said not in EITHER_WAY]
    if not usable:
        return None
    k = usable[loops.hash_u32(seed, step, sample, STREAM_GRAPH_NEGATIVE, 0) % len(usable)]
    relations = list(graph.relations)
    s, said, o = relations[k]
    flip = loops.hash_u32(seed, step, sample, STREAM_GRAPH_NEGATIVE, 1) % 2 == 1
    relations[k] = (s, opposite[said], o) if flip and said in opposite else (o, said, s)
    return SceneGraph(graph.objects, tuple(relations))
