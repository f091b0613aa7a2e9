"""Graph negatives: which relation is told wrongly and how, by Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cases.negative import told_wrongly
from support.graphs import all_graphs, embeddings, pack
from support.loops import jitter

from sgg_fast import ops
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.train.graph_negatives import EITHER_WAY, OPPOSITES, GraphNegatives

SEED, STEP = 5, 9


def test_opposites_are_pairs_of_different_words_and_not_either_way():
    words = [word for pair in OPPOSITES for word in pair]
    assert len(set(words)) == len(words) and not set(words) & set(EITHER_WAY)


WORDS = SceneGraph(("a", "b"), ((0, "right of", 1), (0, "near", 1)))
NEAR = SceneGraph(("tree", "house", "sky"), ((0, "near", 1), (2, "above", 1), (1, "next to", 0)))
ONLY_NEAR = SceneGraph(("tree", "house"), ((0, "near", 1),))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_relation_is_told_wrongly_by_the_hash(backend):
    """X_global of the middle copies is that of the graphs told wrongly; of the others, their own."""
    graphs = [*all_graphs(), NEAR, ONLY_NEAR, WORDS]
    table = NameTable()
    store = SceneGraphBatch.from_graphs(graphs, table)
    negatives = GraphNegatives(table, torch.device("cpu"))
    torch.manual_seed(0)
    model = jitter(SceneGraphConditioner(name_dim=6, image_dim=5, context_dim=8, width=8, num_layers=1))
    names = embeddings(table, 6)
    # Interpreted, the kernels are slow.
    steps, ids = (6, np.array([3, 8, 5, 0, 7, 4, 9, 6])) if backend == "reference" else (1, np.array([8, 5, 7]))
    num, seen = len(ids), set()
    for step in range(STEP, STEP + steps):
        ops.use_kernels(backend)
        try:
            batch = ops.pack(store, np.tile(ids, 3), bucket=(25 * num, 37 * num))
            told, counts = negatives.falsify(batch, num, SEED, torch.tensor([step]), torch.from_numpy(ids))
            found = model.encode(names, told)[2]
        finally:
            ops.use_kernels("auto")
        wrong = [told_wrongly(graphs[i], set(table.names), SEED, step, i) for i in ids.tolist()]
        own = [graphs[i] for i in ids.tolist()]
        assert counts.tolist() == [graph is not None for graph in wrong]
        expected = [*own, *(w or o for w, o in zip(wrong, own, strict=True)), *own]
        packed, _ = pack(*expected, table=table)
        torch.testing.assert_close(found[: 3 * num], model.encode(names, packed)[2], rtol=1e-4, atol=1e-5)
        seen |= {(i, w) for i, w in zip(ids.tolist(), wrong, strict=True)}
    assert (8, None) in seen and (7, None) not in seen
    if backend == "reference":
        near = {w.relations for i, w in seen if i == 7}
        assert {relations[0] for relations in near} == {NEAR.relations[0]}, "as true the other way round"
        assert {relations[1] for relations in near} == {(2, "below", 1), (1, "above", 2)}
