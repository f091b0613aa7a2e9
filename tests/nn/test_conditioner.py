"""Eqs 7 and 8: triple embedding, X_global, the context and its mask, and the statistics the conditioner carries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import loops
from support.cases.conditioner import CONTEXT, IMAGE, NAME, TWO_GRAPHS, WIDTH, conditioner, of_foundation
from support.graphs import GRAPHS, all_graphs, by_name, embeddings, pack, shared_table
from support.loops import assert_rows, split
from support.sd_folder import CLIP_WIDTH
from torch import nn

from sgg_fast import ops
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner, context_length, pooled_phrases

FORMS = [("residual", "roles"), ("plain", "shared")]


@pytest.mark.parametrize(("encoder", "triple"), FORMS)
def test_triple_embedding_and_x_global(encoder, triple):
    model = conditioner(encoder, triple)
    batch, table = pack(*all_graphs())
    names = embeddings(table, NAME)
    x, tokens, x_global = model.encode(names, batch)
    sizes_n, sizes_e = batch.sizes.T.tolist()
    parts = zip(all_graphs(), split(x, sizes_n), split(tokens, sizes_e), x_global, strict=True)
    for graph, x_found, tokens_found, global_found in parts:
        expected = loops.encode(loops.weights(model), graph, by_name(table, names), encoder, triple == "shared")
        assert_rows(x_found, expected.x)
        assert_rows(tokens_found, expected.tokens)
        assert_rows(global_found[None], [expected.x_global])


def test_shared_is_symmetric_and_roles_are_not():
    """As printed, eq. 7 cannot tell subject from object once the embeddings are fixed; separate maps can."""
    torch.manual_seed(0)
    x_s, x_o = torch.randn(2, WIDTH)
    shared, roles = conditioner(triple="shared"), conditioner(triple="roles")
    assert shared.f_object is None and "f_object.weight" not in shared.state_dict()
    swap = roles.f_subject(x_s) + roles.f_object(x_o) - roles.f_subject(x_o) - roles.f_object(x_s)
    assert swap.norm() > 0.1


@pytest.mark.parametrize(("encoder", "triple"), FORMS)
def test_context_layout(encoder, triple):
    model = conditioner(encoder, triple)
    batch, table = pack(*all_graphs())
    names = embeddings(table, NAME)
    found = model(names, batch)
    assert found.context.shape == (len(all_graphs()), 80, CONTEXT)
    for b, graph in enumerate(all_graphs()):
        weights = loops.weights(model)
        encoded = loops.encode(weights, graph, by_name(table, names), encoder, triple == "shared")
        context, mask = loops.context(weights, encoded, 80)
        torch.testing.assert_close(found.context[b].double(), context, rtol=1e-4, atol=1e-5)
        assert found.mask[b].tolist() == mask.tolist()
        assert mask.sum() == 2 + len(graph.relations) + len(graph.objects)
        assert_rows(found.x_global[b : b + 1], [encoded.x_global])


def test_context_global_attends_to_x_global_alone():
    model = conditioner(context="global")
    batch, table = pack(*all_graphs())
    found = model(embeddings(table, NAME), batch)
    assert found.mask.sum(dim=1).tolist() == [1] * batch.num_graphs and found.mask[:, 1].all()
    expected = model.token_norm(model.from_global(found.x_global))
    torch.testing.assert_close(found.context[:, 1], expected)
    same = conditioner()(embeddings(table, NAME), batch)
    torch.testing.assert_close(found.x_global, same.x_global)


@pytest.mark.parametrize(
    ("triples", "length"), [(1, 80), (60, 80), (78, 80), (79, 96), (94, 96), (95, 112), (300, 304)]
)
def test_context_length(triples, length):
    assert context_length(triples) == length


def test_a_large_graph_takes_the_next_multiple_of_16():
    """40 objects and 40 relations are 80 triples; every one keeps its token."""
    large = SceneGraph(("tree",) * 40, tuple((i, "left of", (i + 1) % 40) for i in range(40)))
    model = conditioner()
    batch, table = pack(GRAPHS["one_object"], large)
    names = embeddings(table, NAME)
    found = model(names, batch)
    assert found.context.shape[1] == 96 and found.mask.sum(dim=1).tolist() == [3, 82]
    alone, _ = pack(GRAPHS["one_object"], table=table)
    short = model(names, alone)
    torch.testing.assert_close(found.context[0, :80], short.context[0], rtol=1e-5, atol=1e-6)
    assert not found.context[0, 3:].any()
    _, tokens, _ = model.encode(names, batch)
    torch.testing.assert_close(found.context[1, 2:82], model.token_norm(tokens[1:]))


def test_text_initialised_tokens_start_at_the_phrases_and_open_to_the_graph():
    torch.manual_seed(0)
    model = SceneGraphConditioner(
        name_dim=NAME, image_dim=IMAGE, context_dim=CONTEXT, width=WIDTH, num_layers=2, token_init="text"
    )
    model.calibrate_null(torch.randn(77, CONTEXT))
    model.calibrate_tokens(torch.randn(20, CONTEXT))
    batch, table = pack(*all_graphs())
    names, phrases = embeddings(table, NAME), torch.randn(len(table.phrases), CONTEXT)
    found = model(names, batch, phrases)
    ends = np.cumsum([0, *batch.sizes[:, 1]])
    for b, graph in enumerate(all_graphs()):
        said = [(graph.objects[s], p, graph.objects[o]) for s, p, o in graph.relations]
        said += [(name,) for name in graph.objects]
        expected = torch.stack([phrases[table.phrases.index(" ".join(words))] for words in said])
        torch.testing.assert_close(found.context[b, 2 : 2 + len(said)], expected)
        assert not found.context[b, 1].any(), "X_global's token starts at nothing"
        assert ends[b + 1] - ends[b] == len(said)
    found.context.square().sum().backward()
    assert model.gates.grad[1].abs().min() > 0, "the gate opens although the graph's share is nothing yet"
    with torch.no_grad():
        model.gates.copy_(torch.tensor([[0.5], [2.0]]).expand(2, CONTEXT))
    opened = model(names, batch, phrases)
    with torch.no_grad():
        tokens = model.token_norm(model.encode(names, batch)[1])[: ends[1]]
    torch.testing.assert_close(opened.context[0, 2 : 2 + ends[1]], phrases[batch.phrase[: ends[1]]] + 2 * tokens)
    assert opened.context[:, 1].abs().min() > 0


@pytest.mark.parametrize(("encoder", "triple"), FORMS)
def test_a_graph_does_not_depend_on_its_batch(encoder, triple):
    model, table, graphs = conditioner(encoder, triple), shared_table(), all_graphs()
    names = embeddings(table, NAME)
    for order in (graphs, graphs[::-1], [graphs[2], *graphs[:2], graphs[2]]):
        found = model(names, pack(*order, table=table)[0])
        for b, graph in enumerate(order):
            alone = model(names, pack(graph, table=table)[0])
            torch.testing.assert_close(found.context[b], alone.context[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.x_global[b], alone.x_global[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(found.mask[b], alone.mask[0])


@pytest.mark.parametrize(("encoder", "triple"), FORMS)
def test_padding_is_inert(encoder, triple):
    """A batch padded to a bucket by one more graph gives every real graph the same result."""
    model, table = conditioner(encoder, triple), shared_table()
    store, _ = pack(*all_graphs(), table=table)
    names, ids = embeddings(table, NAME), np.array([6, 2, 0])
    exact, padded = model(names, ops.pack(store, ids)), model(names, ops.pack(store, ids, bucket=(24, 33)))
    assert len(padded.context) == 4 and torch.isfinite(padded.context).all()
    torch.testing.assert_close(padded.context[:3], exact.context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.x_global[:3], exact.x_global, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded.mask[:3], exact.mask)


def test_gradients_stay_within_a_graph():
    """The same claim for the backward pass: another graph's names get no gradient."""
    model = conditioner()
    first, second = SceneGraph(("sheep", "sky"), ((0, "below", 1),)), SceneGraph(("boat", "sea"), ((0, "on", 1),))
    batch, table = pack(first, second)
    names = embeddings(table, NAME).requires_grad_()
    model(names, batch).context[0].square().sum().backward()
    reached = {name for i, name in enumerate(table.names) if names.grad[i].abs().sum() > 0}
    assert reached == {"sheep", "sky", "below", "__image__", "__in_image__"}


def test_null_condition_is_the_empty_text_then_masked_padding():
    model = conditioner()
    for length in (80, 96):
        context, mask = model.null_condition(3, length)
        assert context.shape == (3, length, CONTEXT)
        for b in range(3):
            assert torch.equal(context[b, :77], model.null_states) and not context[b, 77:].any()
            assert mask[b].tolist() == [True] * 77 + [False] * (length - 77)


def test_a_short_null_condition_lets_the_context_be_as_long_as_its_graphs():
    """What is told of a graph is the same, without the padding; the null condition is the first states of ""."""
    long, short = (conditioner(null_tokens=num) for num in (77, 2))
    short.load_state_dict(long.state_dict())
    batch, table = pack(*all_graphs()[:3])
    names = embeddings(table, NAME)
    full, trimmed = long(names, batch), short(names, batch)
    num, most = trimmed.context.shape[1], int(full.mask.sum(dim=1).max())
    assert num == -(-most // 8) * 8 < full.context.shape[1]
    assert torch.equal(trimmed.context, full.context[:, :num]) and torch.equal(trimmed.mask, full.mask[:, :num])
    context, mask = short.null_condition(3, num)
    assert context.shape == (3, num, CONTEXT) and mask.tolist() == [[True] * 2 + [False] * (num - 2)] * 3
    assert torch.equal(context[:, :2], short.null_states[:2].expand(3, -1, -1)) and not context[:, 2:].any()
    dropped = short.drop(trimmed, torch.tensor([False, True, False]))
    assert torch.equal(dropped.context[1], context[0]) and torch.equal(dropped.mask[1], mask[0])
    assert [context_length(n, 2) for n in (1, 6, 7, 100)] == [8, 8, 16, 104] and context_length(3, 40) == 40


def test_drop_exchanges_whole_conditions_and_keeps_x_global():
    model = conditioner()
    batch, table = pack(*all_graphs()[:3])
    given = model(embeddings(table, NAME), batch)
    dropped = torch.tensor([False, True, False])
    found = model.drop(given, dropped)
    null_context, null_mask = model.null_condition(1, 80)
    for b in range(3):
        context, mask = (null_context[0], null_mask[0]) if dropped[b] else (given.context[b], given.mask[b])
        assert torch.equal(found.context[b], context) and torch.equal(found.mask[b], mask)
    assert found.x_global is given.x_global


def test_tokens_start_at_the_statistics_of_sds_text_states():
    torch.manual_seed(0)
    model = SceneGraphConditioner(name_dim=NAME, image_dim=IMAGE, context_dim=256, width=WIDTH, num_layers=2)
    states, null = 2.5 * torch.randn(300, 256) - 4, torch.randn(77, 256)
    model.calibrate_null(null)
    model.calibrate_tokens(states)
    for k in (0, 100, 255):
        column = [float(v) for v in states[:, k]]
        centre = sum(column) / 300
        spread = (sum((v - centre) ** 2 for v in column) / 300) ** 0.5
        assert model.token_norm.bias[k].item() == pytest.approx(centre, rel=1e-4)
        assert model.token_norm.weight[k].item() == pytest.approx(spread, rel=5e-3)
    assert torch.equal(model.null_states, null) and torch.equal(model.start_state, null[0])
    batch, table = pack(*all_graphs())
    found = model(embeddings(table, NAME), batch)
    tokens = found.context[found.mask].reshape(-1, 256)
    graph_tokens = tokens[(tokens - null[0]).abs().sum(1) > 1e-6]
    assert len(graph_tokens) == batch.num_relations + batch.num_graphs
    assert graph_tokens.mean().item() == pytest.approx(-4, abs=0.1)
    assert (graph_tokens - model.token_norm.bias).std().item() == pytest.approx(2.5, rel=0.05)


def test_names_are_centred_and_of_unit_rms():
    raw = 3 + torch.randn(9, NAME, generator=torch.Generator().manual_seed(0))
    model = conditioner()
    model.calibrate_names(raw, torch.arange(9))
    centre = [sum(float(raw[v, k]) for v in range(9)) / 9 for k in range(NAME)]
    square = sum((float(raw[v, k]) - centre[k]) ** 2 for v in range(9) for k in range(NAME)) / (9 * NAME)
    found = model.standardise(raw)
    for v in range(9):
        for k in range(NAME):
            assert found[v, k].item() == pytest.approx((float(raw[v, k]) - centre[k]) / square**0.5, abs=1e-5)


def test_predicting_the_mean_of_the_targets_scores_one():
    """Targets are standardised over objects as often as they occur, so chance of the auto-encoder is exactly 1."""
    raw = 3 + torch.randn(9, NAME, generator=torch.Generator().manual_seed(0))
    occurring = torch.tensor([2, 2, 2, 5, 7, 7])
    model = conditioner()
    model.calibrate_names(raw, occurring)
    targets = model.targets(model.standardise(raw))[occurring]
    for k in range(NAME):
        column = targets[:, k].tolist()
        assert sum(column) / 6 == pytest.approx(0, abs=1e-5)
        assert sum(v * v for v in column) / 6 == pytest.approx(1, rel=1e-4)


def test_images_are_brought_to_unit_norm_centred_and_brought_back():
    model = conditioner()
    raw = torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 6.0, 8.0]])
    model.image_mean.copy_(torch.tensor([0.1, 0.2, 0.0, 0.3, 0.0, 0.0]))
    found = model.centre_images(raw)
    for row, unit in zip(found, ([0.6, 0.8, 0, 0, 0, 0], [0, 0, 0, 0, 0.6, 0.8]), strict=True):
        moved = [u - m for u, m in zip(unit, (0.1, 0.2, 0.0, 0.3, 0.0, 0.0), strict=True)]
        norm = sum(v * v for v in moved) ** 0.5
        assert row.tolist() == pytest.approx([v / norm for v in moved], abs=1e-6)


def test_statistics_travel_with_the_weights(tmp_path):
    model = conditioner("plain", "shared")
    model.calibrate_names(2 + torch.randn(6, NAME), torch.arange(6))
    model.image_mean.copy_(torch.randn(IMAGE))
    model.save_pretrained(tmp_path)
    again = SceneGraphConditioner.from_pretrained(tmp_path).eval()
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    batch, table = pack(*all_graphs())
    names = embeddings(table, NAME)
    for ours, theirs in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert torch.equal(model(names, batch).context, again(names, batch).context)


@pytest.mark.parametrize(("encoder", "triple"), FORMS)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16_keeps_its_error_to_twice_that_of_rounding(encoder, triple, how):
    """Under autocast and with bf16 weights: no mixed-dtype failure, and no more error than rounding every weight."""
    model = conditioner(encoder, triple)
    batch, table = pack(*all_graphs())
    names = embeddings(table, NAME)
    exact = model(names, batch)
    rounded = conditioner(encoder, triple)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    floor = (rounded(names.bfloat16().float(), batch).context - exact.context).norm() + 2**-8 * exact.context.norm()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = model(names, batch)
    else:
        found = conditioner(encoder, triple).to(torch.bfloat16)(names.bfloat16(), batch)
        assert found.context.dtype == torch.bfloat16
    assert torch.isfinite(found.context).all() and torch.isfinite(found.x_global).all()
    assert (found.context.float() - exact.context).norm() < 2 * floor
    assert torch.equal(found.mask, exact.mask)


def test_the_null_condition_is_the_empty_text_or_zeros_as_the_folder_says(foundations):
    model, rows = of_foundation(foundations["sdxl"]), foundations["sdxl"].towers.read([""])[0][0]
    width = foundations["sdxl"].backbone.context_dim
    for zeros in (True, False):
        model.calibrate_null(rows, zeros)
        context, mask = model.null_condition(1, 80)
        torch.testing.assert_close(context[0, :77], rows[:, :width] * (not zeros))
        torch.testing.assert_close(model.null_pooled, rows[0, width:] * (not zeros))
        torch.testing.assert_close(model.start_state, rows[0, :width])
        assert mask.sum() == 77


@pytest.mark.parametrize("token_init", ["none", "text"])
def test_the_pooled_vector_starts_at_the_texts_and_is_dropped_with_the_context(foundations, token_init):
    foundation = foundations["sdxl"]
    model, towers, width = (
        of_foundation(foundation, token_init=token_init),
        foundation.towers,
        foundation.backbone.context_dim,
    )
    batch, table = pack(*TWO_GRAPHS)
    phrases, names = towers.phrases(table.phrases), embeddings(table, CLIP_WIDTH)
    vocabulary = towers.read(table.spoken())[1]
    model.calibrate_null(towers.read([""])[0][0], foundation.empty_is_zero)
    model.calibrate_tokens(vocabulary)
    given = model(names, batch, phrases if token_init == "text" else None)
    expected = vocabulary[:, width:].mean(0).expand(2, -1)
    if token_init == "text":
        expected = pooled_phrases(phrases[:, width:], batch)
        own = [phrases[batch.phrase[a:b].long(), width:].float() for a, b in batch.relation_ptr.long().unfold(0, 2, 1)]
        for row, told in zip(expected, own, strict=True):
            torch.testing.assert_close(row.norm(), told.norm(dim=1).mean())
            torch.testing.assert_close(row / row.norm(), nn.functional.normalize(told.mean(0), dim=0))
    torch.testing.assert_close(given.pooled, expected)
    dropped = model.drop(given, torch.tensor([True, False]))
    assert not dropped.pooled[0].any() and torch.equal(dropped.pooled[1], given.pooled[1])
    dropped.pooled.sum().backward()
    assert model.to_pooled.weight.grad.any(), "the map of X_global trains from the first step"


def test_v1_and_v2_have_no_pooled_vector(foundations):
    model = of_foundation(foundations["sd21"])
    batch, table = pack(*TWO_GRAPHS)
    given = model(embeddings(table, CLIP_WIDTH), batch, foundations["sd21"].towers.phrases(table.phrases))
    assert given.pooled is None and model.drop(given, torch.tensor([True, False])).pooled is None
    assert not any("pooled" in name for name in model.state_dict())


@pytest.mark.parametrize("token_init", ["none", "text"])
def test_what_a_conditioner_reads_of_a_table_of_names(foundations, token_init):
    """Names standardised by their own mean and size; each phrase's state, where its tokens start from there."""
    towers = foundations["sd21"].towers
    model = of_foundation(foundations["sd21"], token_init=token_init, gate_init=0.0)
    batch, table = pack(*TWO_GRAPHS)
    raw = 3 + 2 * embeddings(table, CLIP_WIDTH)
    model.calibrate_names(raw, torch.arange(len(table)))
    names, rows = model.names_of(table, raw), model.read(TWO_GRAPHS, table, towers)
    torch.testing.assert_close(names.mean(0), torch.zeros(CLIP_WIDTH), rtol=0, atol=1e-5)
    assert names.square().mean().item() == pytest.approx(1, rel=1e-4)
    if token_init == "none":
        assert rows is None
        return
    assert len(table.phrases) == len(rows)
    for phrase, row in zip(table.phrases, rows, strict=True):
        torch.testing.assert_close(row, towers.read([phrase])[1][0].half())
    given = model(names, batch, rows)
    torch.testing.assert_close(given.context[1, 2], rows[table.phrases.index("red hat")].float())


def test_the_first_conditions_are_those_of_the_first_graphs(foundations):
    model = of_foundation(foundations["sdxl"])
    batch, table = pack(*TWO_GRAPHS)
    given = model(embeddings(table, CLIP_WIDTH), batch)
    first = given.first(1)
    for name in ("context", "mask", "x_global", "pooled"):
        assert torch.equal(getattr(first, name), getattr(given, name)[:1]), name
    assert first.tokens is given.tokens and given._replace(pooled=None).first(1).pooled is None
