"""The SGDiff baseline against loops: triple convolutions, the global token and fifteen local ones."""

from __future__ import annotations

import torch

from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.sgdiff import NUM_LOCAL, SGDiffConditioner

GRAPH = SceneGraph(("sheep", "red hat", "sheep", "sun"), ((0, "wearing", 1), (0, "left of", 2)))
LONE = SceneGraph(("dog",))


def many(num: int) -> SceneGraph:
    """A graph of more triples than get a token."""
    return SceneGraph(tuple("abcdef"), tuple((i % 6, "by", (i + 1) % 6) for i in range(num)))


def test_sgdiff_against_loops():
    torch.manual_seed(0)
    graphs = [GRAPH, many(18), LONE]
    table = NameTable()
    batch = SceneGraphBatch.from_graphs(graphs, table)
    model = SGDiffConditioner(8, 12, width=16, trained_names=tuple(n for n in table.names if n != "sun")).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    given = model(model.names_of(table, torch.zeros(len(table), 4)), batch)
    assert len(given.tokens) == batch.num_relations, "also of the triples without a token in the context"
    for b, graph in enumerate(graphs):
        objects = [*graph.objects, "__image__"]
        image = len(graph.objects)
        triples = [*graph.relations, *((i, "__in_image__", image) for i in range(image))]
        rows = {name: row for row, name in enumerate(model.config.trained_names, start=1)}

        def embed(name: str, rows: dict[str, int] = rows) -> torch.Tensor:
            return model.embedding.weight[rows[name]] if name in rows else torch.zeros(16).double()

        x, r = [embed(name) for name in objects], [embed(p) for _, p, _ in triples]
        assert len(model.relation_encoder.layers) == 6
        for layer in model.relation_encoder.layers:
            ws, wo = layer.object_weight.chunk(2)
            messages: list[list[torch.Tensor]] = [[] for _ in objects]
            r_new = []
            for (s, _, o), r_e in zip(triples, r, strict=True):
                hidden = torch.relu(ws @ x[s] + layer.relation_weight @ r_e + wo @ x[o] + layer.bias)
                m_s, r_e, m_o = torch.relu(layer.second.weight @ hidden + layer.second.bias).chunk(3)
                messages[s].append(m_s)
                messages[o].append(m_o)
                r_new.append(r_e)
            first, last = layer.update[0], layer.update[2]
            means = [torch.stack(own).mean(0) for own in messages]
            x = [torch.relu(last.weight @ torch.relu(first.weight @ m + first.bias) + last.bias) for m in means]
            r = r_new
        pooled = torch.cat([torch.stack(x).mean(0), torch.stack(r).mean(0)])
        tokens = [model.to_global.weight @ pooled + model.to_global.bias]
        for k in range(NUM_LOCAL):
            local = torch.zeros(48).double()
            if k < len(triples):
                local = torch.cat([x[triples[k][0]], r[k], x[triples[k][2]]])
            tokens.append(model.to_local.weight @ local + model.to_local.bias)
        torch.testing.assert_close(given.context[b, :16], torch.stack(tokens))
        first, num = int(batch.relation_ptr[b]), min(len(triples), NUM_LOCAL)
        torch.testing.assert_close(given.tokens[first : first + num], torch.stack(tokens[1 : 1 + num]))
    assert given.mask[:, :16].all() and not given.mask[:, 16:].any(), "all sixteen are attended to"
