"""Eqs 3-6 against loops on one graph at a time, what a batch must not change, and that names reach the outputs."""

from __future__ import annotations

import pytest
import torch
from support import loops
from support.graphs import GRAPHS, all_graphs, by_name, clip_like, embeddings, nodes, pack, shared_table, triples
from support.loops import assert_rows, jitter, split

from sgg_fast.graph import NameTable, SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.encoder import RelationEncoder, TripleConv

WIDTH = 8
FORMS = ["residual", "plain"]


@pytest.mark.parametrize("form", FORMS)
def test_triple_convolution(form):
    torch.manual_seed(0)
    layer = jitter(TripleConv(WIDTH, form))
    batch, _ = pack(*all_graphs())
    x, r = torch.randn(batch.num_objects, WIDTH), torch.randn(batch.num_relations, WIDTH)
    x_new, r_new = layer(x, r, batch)
    sizes_n, sizes_e = batch.sizes.T.tolist()
    both = zip(split(x, sizes_n), split(x_new, sizes_n), split(r, sizes_e), split(r_new, sizes_e), strict=True)
    for graph, (x_in, x_out, r_in, r_out) in zip(all_graphs(), both, strict=True):
        ends = [(s, o) for s, _, o in triples(graph)]
        x_expected, r_expected = loops.triple_conv(
            loops.weights(layer), list(x_in.double()), list(r_in.double()), ends, form == "residual"
        )
        assert_rows(x_out, x_expected)
        assert_rows(r_out, r_expected)


def test_messages_of_both_roles_share_one_mean():
    """An object that is subject once and object twice averages three messages, not two means."""
    torch.manual_seed(0)
    layer = TripleConv(2, "plain")
    with torch.no_grad():
        for linear, value in ((layer.update[0], torch.eye(2)), (layer.update[2], torch.eye(2))):
            linear.weight.copy_(value)
        layer.second.weight.zero_()
        layer.second.bias.copy_(torch.tensor([3.0, 0.0, 5.0, 7.0, 0.0, 6.0]))  # m_s = (3, 0), r' = (5, 7), m_o = (0, 6)
    batch, _ = pack(SceneGraph(("a", "b", "c"), ((0, "x", 1), (1, "x", 0), (2, "x", 0))))
    x, r = layer(torch.zeros(4, 2), torch.zeros(6, 2), batch)
    # Each object is also the subject of its relation to the image node, which receives three times m_o.
    assert torch.allclose(x, torch.tensor([[6 / 4, 12 / 4], [6 / 3, 6 / 3], [6 / 2, 0.0], [0.0, 18 / 3]]))
    assert torch.equal(r, torch.tensor([[5.0, 7.0]]).expand(6, -1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name_dim", [WIDTH, 5])
def test_relation_encoder(form, name_dim):
    torch.manual_seed(0)
    encoder = jitter(RelationEncoder(name_dim, WIDTH, 3, form))
    batch, table = pack(*all_graphs())
    names = embeddings(table, name_dim)
    x, r = encoder(names, batch)
    sizes_n, sizes_e = batch.sizes.T.tolist()
    for graph, x_found, r_found in zip(all_graphs(), split(x, sizes_n), split(r, sizes_e), strict=True):
        x_expected, r_expected = loops.relation_encoder(loops.weights(encoder), graph, by_name(table, names), form)
        assert_rows(x_found, x_expected)
        assert_rows(r_found, r_expected)


@pytest.mark.parametrize("form", FORMS)
def test_masked_objects_start_as_the_mask_token(form):
    torch.manual_seed(0)
    encoder = jitter(RelationEncoder(WIDTH, WIDTH, 2, form))
    graph = GRAPHS["isolated"]
    batch, table = pack(graph)
    names = embeddings(table, WIDTH)
    masked = torch.tensor([False, True, False, True, False])
    x, _ = encoder(names, batch, masked)
    assert_rows(x, loops.relation_encoder(loops.weights(encoder), graph, by_name(table, names), form, {1, 3})[0])
    for hidden in ("red hat", "rock"):
        names[table.add(hidden)] += 5.0
    assert torch.equal(x, encoder(names, batch, masked)[0]), "the encoder saw a masked name"


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_does_not_depend_on_its_batch(form):
    torch.manual_seed(0)
    encoder = jitter(RelationEncoder(WIDTH, WIDTH, 3, form))
    table = shared_table()
    names, graphs = embeddings(table, WIDTH), all_graphs()
    for order in (graphs, graphs[::-1], [*graphs, *graphs]):
        batch, _ = pack(*order, table=table)
        x, r = encoder(names, batch)
        sizes_n, sizes_e = batch.sizes.T.tolist()
        for graph, x_found, r_found in zip(order, split(x, sizes_n), split(r, sizes_e), strict=True):
            x_alone, r_alone = encoder(names, pack(graph, table=table)[0])
            torch.testing.assert_close(x_found, x_alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(r_found, r_alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_duplicates_in_one_role_are_alike_and_direction_tells_them_apart(form):
    torch.manual_seed(0)
    encoder = RelationEncoder(WIDTH, WIDTH, 2, form)
    batch, table = pack(GRAPHS["hub"], SceneGraph(("sheep", "sheep"), ((0, "left of", 1),)))
    x, _ = encoder(embeddings(table, WIDTH), batch)
    torch.testing.assert_close(x[1:6], x[1:2].expand(5, -1), rtol=1e-5, atol=1e-6)
    assert (x[7] - x[8]).norm() > 0.01 * x[7].norm()


def test_initial_weights_are_kaiming():
    """He et al.: variance 2 / fan_in, where W1's fan-in is the whole triple; biases 0."""
    torch.manual_seed(0)
    width = 128
    layer = TripleConv(width, "plain")
    for weight, fan_in in (
        (layer.object_weight, 3 * width),
        (layer.relation_weight, 3 * width),
        (layer.second.weight, width),
        (layer.update[0].weight, width),
        (layer.update[2].weight, width),
    ):
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
    assert all(not b.any() for b in (layer.bias, layer.second.bias, layer.update[0].bias, layer.update[2].bias))


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("form", FORMS)
def test_one_name_moves_the_outputs(form):
    """At the real size: with names as parallel as CLIP's, one of them moves every output by over 1 %."""
    torch.manual_seed(0)
    model = SceneGraphConditioner(encoder=form).eval()
    assert (len(model.relation_encoder.layers), model.config.width) == (6, 512)
    table = NameTable(["sheep", "grass", "sky", "tree", "zebra", "on", "above", "by"])
    raw = clip_like(len(table), 512, cosine=0.8)
    assert (raw @ raw.T - 0.8).fill_diagonal_(0).abs().max() < 0.1
    model.calibrate_names(raw, torch.arange(len(table)))
    relations = ((0, "on", 1), (2, "above", 1), (3, "by", 0))
    outputs = []
    for subject, predicate in (("sheep", "on"), ("zebra", "on"), ("sheep", "by")):
        graph = SceneGraph((subject, "grass", "sky", "tree"), ((0, predicate, 1), *relations[1:]))
        with torch.no_grad():
            outputs.append(model(model.standardise(raw), pack(graph, table=table)[0]))
    base = outputs[0]
    used = slice(1, 2 + len(relations) + 4)
    for other in outputs[1:]:
        assert change(base.x_global, other.x_global) > 0.01
        assert change(base.context[:, used], other.context[:, used]) > 0.01
    own = [base.context[0, 2], outputs[1].context[0, 2]]
    assert change(*own) > 0.01, "the token of the triple that holds the name"


def test_nodes_end_with_the_image():
    """The loops and the packed batch agree on what the model sees."""
    batch, table = pack(GRAPHS["chain"])
    assert [table.names[i] for i in batch.object_name] == nodes(GRAPHS["chain"])
    seen = zip(batch.subject.tolist(), batch.predicate_name.tolist(), batch.object.tolist(), strict=True)
    assert [(s, table.names[p], o) for s, p, o in seen] == triples(GRAPHS["chain"])
