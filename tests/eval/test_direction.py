"""The direction gate on the shipped model, and on an encoder that is blind to direction."""

from __future__ import annotations

import torch

from sgg_fast.drawing.models import load_model
from sgg_fast.eval.direction import measure_direction
from sgg_fast.graph import SceneGraph

GRAPHS = [
    SceneGraph(("dog", "house"), ((0, "left of", 1),)),
    SceneGraph(("sun", "boat", "sea"), ((0, "above", 1),)),
]


def test_the_direction_gate_sees_a_blind_encoder():
    """With the encoder's relation weights and roles made equal, nothing moves; the shipped one moves."""
    pipeline = load_model("toy").pipeline
    found = measure_direction(pipeline, GRAPHS)
    assert found.num_relations == 2
    assert found.graph_flipped > 0
    with torch.no_grad():
        for parameter in pipeline.graph_encoder.parameters():
            parameter.zero_()
    blind = measure_direction(pipeline, [GRAPHS[0]])
    assert not blind.passed
    assert not measure_direction(pipeline, [SceneGraph(("dog",))]).passed
