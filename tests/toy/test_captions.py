"""Captions: whole, shuffled and partial."""

from __future__ import annotations

import numpy as np

from sgg_fast.graph import SceneGraph
from sgg_fast.toy.captions import caption

GRAPH = SceneGraph(("sheep", "red hat", "grass", "sky"), ((0, "wearing", 1), (0, "standing on", 2)))
PHRASES = ["sheep wearing red hat", "sheep standing on grass", "sky"]


def test_a_caption_has_every_relation_and_the_objects_without_one():
    assert caption(GRAPH) == "sheep wearing red hat, sheep standing on grass, sky"
    assert caption(SceneGraph(("dog",))) == "dog"


def test_shuffled_captions_keep_their_phrases_and_partial_ones_some():
    rng = np.random.default_rng(0)
    whole = {caption(GRAPH, rng) for _ in range(60)}
    assert len(whole) == 6 and all(sorted(text.split(", ")) == sorted(PHRASES) for text in whole)
    some = [caption(GRAPH, rng, partial=0.5) for _ in range(400)]
    short = [text for text in some if len(text.split(", ")) < 3]
    names = [text for text in short if text in GRAPH.objects and text not in PHRASES]
    assert all(set(text.split(", ")) <= {*PHRASES, *GRAPH.objects} for text in short)
    # Half are partial; of those 30 % are a name, and of the rest a third has all three phrases.
    assert 0.3 < len(short) / 400 < 0.5 and set(names) == {"sheep", "red hat", "grass"}
