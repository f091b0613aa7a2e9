"""Scene graphs as sentences, the training texts of the toy's CLIP and of its text-conditioned UNet.

The form: one phrase for each relation, "subject predicate object", then the objects without relations, all joined by ",
". An attribute stands before its name, as in the graph.
"""

from __future__ import annotations

import numpy as np

from sgg_fast.graph import SceneGraph
from sgg_fast.nn.text_baseline import phrases


def caption(graph: SceneGraph, rng: np.random.Generator | None = None, partial: float = 0.0) -> str:
    """The sentence of `graph`; with `rng` its phrases are shuffled.

    With probability `partial` it contains only some phrases, or a single object's name.
    """
    parts = phrases(graph)
    if rng is None:
        return ", ".join(parts)
    rng.shuffle(parts)
    if rng.random() < partial:
        if rng.random() < 0.3:
            return graph.objects[rng.integers(len(graph.objects))]
        parts = parts[: rng.integers(1, len(parts) + 1)]
    return ", ".join(parts)
