"""The masked auto-encoder: who is masked, what the decoder computes, and that it stays within a graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sgg_kernels.reference.pack import MASK_STREAM
from support import loops
from support.cases.conditioner import NAME, conditioner
from support.graphs import GRAPHS, all_graphs, by_name, embeddings, pack
from support.loops import assert_rows, jitter, split

from sgg_fast import ops
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.mae import MaskedObjectDecoder, Places


def mask(
    graphs: list[SceneGraph], ids: list[int], ratio: float = 0.3, step: int = 0, seed: int = 0, first_copy: int = 0
) -> list[list[bool]]:
    """Masks of the graphs `ids` of a store of `graphs`, the graphs from `first_copy` on being masked copies."""
    store, _ = pack(*graphs)
    batch, found = ops.pack_masked(store, np.array(ids), ops.MaskDraw(first_copy, ratio, seed, step))
    return [part.tolist() for part in found.split(batch.sizes[:, 0].tolist())]


def plain_graph(num: int) -> SceneGraph:
    return SceneGraph(("tree",) * num)


@pytest.mark.parametrize("percent", [10, 30, 50, 75, 100])
def test_count_of_masked_objects(percent):
    """Rounded, halves up, in whole-number arithmetic; at least one masked and one kept; the image node never."""
    graphs = [plain_graph(num) for num in range(1, 31)]
    for num, found in zip(range(1, 31), mask(graphs, list(range(30)), percent / 100), strict=True):
        rounded = (2 * percent * num + 100) // 200
        expected = 0 if num == 1 else min(max(rounded, 1), num - 1)
        assert sum(found) == expected, num
        assert not found[-1], "the image node was masked"
    store, ids = pack(*graphs)[0], [29, 0, 4, 4]
    assert ops.num_masked(store, np.array(ids), percent / 100) == sum(map(sum, mask(graphs, ids, percent / 100)))


def test_the_lowest_hashes_are_masked():
    graphs = [plain_graph(num) for num in (30, 2, 5, 9)]
    ids = [3, 0, 2, 1]
    for sample, found in zip(ids, mask(graphs, ids, 0.3, step=5, seed=3), strict=True):
        num = len(graphs[sample].objects)
        expected = loops.masked_objects(num, 0.3, seed=3, step=5, sample=sample, stream=MASK_STREAM)
        assert {i for i, hidden in enumerate(found) if hidden} == expected


def test_only_copies_are_masked():
    graphs = [plain_graph(6), plain_graph(4)]
    found = mask(graphs, [0, 1, 0, 1], first_copy=2)
    assert [sum(part) for part in found] == [0, 0, 2, 1]
    assert found[2:] == mask(graphs, [0, 1])


def test_a_mask_depends_on_seed_step_and_graph_but_not_on_the_batch():
    graphs = [plain_graph(30), plain_graph(3), plain_graph(30)]
    together = mask(graphs, [0, 1, 2, 0])
    assert together[0] == together[3] != together[2]
    for place, graph in enumerate([0, 1, 2]):
        assert together[place] == mask(graphs, [graph])[0] == mask(graphs, [2, graph, 1])[1]
    assert together[0] != mask(graphs, [0], step=1)[0]
    assert together[0] != mask(graphs, [0], seed=1)[0]
    assert together[0] == mask(graphs, [0], step=0, seed=0)[0]


def test_every_object_is_masked_equally_often():
    """3 of 10 objects over 3 000 steps and graphs: 900 each, standard deviation 25."""
    for graphs, steps in (([plain_graph(10)] * 3000, [0]), ([plain_graph(10)] * 60, list(range(50)))):
        counts: Counter[int] = Counter()
        for step in steps:
            for found in mask(graphs, list(range(len(graphs))), step=step):
                counts.update(i for i, hidden in enumerate(found) if hidden)
        assert sum(counts.values()) == 9000
        assert all(abs(counts[i] - 900) < 5 * 25 for i in range(10))


@pytest.mark.parametrize("form", ["residual", "plain"])
def test_nothing_that_leaves_the_masked_copy_knows_the_masked_names(form):
    """Objects, tokens and X_global of the copy: the same bits whatever the hidden names are."""
    model = conditioner(form)
    batch, table = pack(GRAPHS["isolated"])
    hidden = torch.tensor([False, True, False, False, False])
    names = embeddings(table, NAME)
    before = model.encode(names, batch, hidden)
    names[table.add("red hat")] = 9.0
    after = model.encode(names, batch, hidden)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    open_copy = model.encode(names, batch)
    assert not torch.allclose(open_copy[2], after[2])


@pytest.mark.parametrize("form", ["residual", "plain"])
def test_masked_encoding_against_loops(form):
    model = conditioner(form)
    batch, table = pack(GRAPHS["duplicates"])
    names = embeddings(table, NAME)
    x, tokens, x_global = model.encode(names, batch, torch.tensor([True, False, True, False]))
    expected = loops.encode(loops.weights(model), GRAPHS["duplicates"], by_name(table, names), form, masked={0, 2})
    assert_rows(x, expected.x)
    assert_rows(tokens, expected.tokens)
    assert_rows(x_global, [expected.x_global])


WIDTH, IMAGE, HEADS = 8, 6, 4


def decoder() -> MaskedObjectDecoder:
    torch.manual_seed(0)
    return jitter(MaskedObjectDecoder(WIDTH, NAME, IMAGE, num_heads=HEADS))


def decode(model: MaskedObjectDecoder, graphs: list[SceneGraph], x: list[torch.Tensor], x_global: torch.Tensor):
    """Predictions of each graph, decoded in one batch."""
    batch, _ = pack(*graphs)
    sizes = batch.sizes[:, 0].tolist()
    places = Places.of(batch.object_graph, batch.object_ptr, max(sizes))
    assert places.present.sum(1).tolist() == sizes
    return split(model(places.rows(torch.cat(x)), x_global, places.present)[places.present], sizes)


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(len(graph.objects) + 1, WIDTH, generator=generator) for graph in all_graphs()]
    return x, torch.randn(len(x), IMAGE, generator=generator)


def test_decoder_against_loops():
    model = decoder()
    x, x_global = inputs()
    for found, rows, one in zip(decode(model, all_graphs(), x, x_global), x, x_global, strict=True):
        expected = loops.mae_decoder(loops.weights(model), list(rows.double()), one.double(), HEADS)
        assert_rows(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_decoder_keeps_graphs_apart(training):
    """In training and in the fused inference path: neighbours and padding change nothing."""
    model = decoder().train(training)
    x, x_global = inputs()
    with torch.set_grad_enabled(training):
        together = decode(model, all_graphs(), x, x_global)
        backwards = decode(model, all_graphs()[::-1], x[::-1], x_global.flip(0))[::-1]
        for i, graph in enumerate(all_graphs()):
            (alone,) = decode(model, [graph], x[i : i + 1], x_global[i : i + 1])
            torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(backwards[i], alone, rtol=1e-5, atol=1e-5)


def test_decoder_reads_x_global_and_every_object():
    model = decoder()
    x, x_global = inputs()
    x = [rows.requires_grad_() for rows in x]
    x_global.requires_grad_()
    decode(model, all_graphs(), x, x_global)[1][0].sum().backward()
    assert (x[1].grad.abs().sum(dim=1) > 0).all()
    assert [bool(row.abs().sum() > 0) for row in x_global.grad] == [i == 1 for i in range(len(x))]
    others = [rows.grad for i, rows in enumerate(x) if i != 1]
    assert not any(grad.any() for grad in others)
