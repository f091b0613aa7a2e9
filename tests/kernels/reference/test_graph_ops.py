"""The pure-torch form of every graph kernel against loops, and its gradients in float64."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import reference
from support import loops
from support.graphs import GRAPHS, all_graphs, pack

from sgg_fast.graph import SceneGraphBatch

WIDTH = 3


def rows(num: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def batch() -> SceneGraphBatch:
    return pack(*all_graphs())[0]


def empty_plan() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three objects that nothing relates."""
    zeros = torch.zeros(3, dtype=torch.int32)
    return torch.zeros(4, dtype=torch.int32), zeros, torch.zeros(0, dtype=torch.int32)


def test_gather_add_relu(batch):
    num_n, num_e = batch.num_objects, batch.num_relations
    a, c, b, bias = rows(num_n, 5, 0), rows(num_n, 5, 1), rows(num_e, 5, 2), rows(1, 5, 3)[0]
    found = reference.gather_add_relu(a, b, c, bias, batch.subject, batch.object)
    for e in range(num_e):
        s, o = int(batch.subject[e]), int(batch.object[e])
        torch.testing.assert_close(found[e], loops.relu(a[s] + b[e] + c[o] + bias))


def test_gather_add_relu_takes_views_of_one_gemm(batch):
    ac = rows(batch.num_objects, 10, 0)
    b, bias = rows(batch.num_relations, 5, 1), rows(1, 5, 2)[0]
    a, c = ac.chunk(2, dim=1)
    found = reference.gather_add_relu(a, b, c, bias, batch.subject, batch.object)
    expected = reference.gather_add_relu(a.clone(), b, c.clone(), bias, batch.subject, batch.object)
    assert not a.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("with_residual", [False, True])
def test_scatter_mean_is_the_mean_over_the_union_of_roles(batch, with_residual):
    y, bias = rows(batch.num_relations, 3 * WIDTH, 0), rows(1, 3 * WIDTH, 1)[0]
    residual = rows(batch.num_relations, WIDTH, 2) if with_residual else None
    means, relations = reference.scatter_mean(y, *batch.plan, bias, residual)
    for i in range(batch.num_objects):
        inbox = []
        for e in range(batch.num_relations):
            if batch.subject[e] == i:
                inbox.append(loops.relu(y[e, :WIDTH] + bias[:WIDTH]))
            if batch.object[e] == i:
                inbox.append(loops.relu(y[e, 2 * WIDTH :] + bias[2 * WIDTH :]))
        assert inbox, "the image node and its relations reach every object"
        torch.testing.assert_close(means[i], loops.mean(inbox, WIDTH))
    for e in range(batch.num_relations):
        own = loops.relu(y[e, WIDTH : 2 * WIDTH] + bias[WIDTH : 2 * WIDTH])
        torch.testing.assert_close(relations[e], own if residual is None else residual[e] + own)


def test_an_object_without_messages_gets_zero():
    means, relations = reference.scatter_mean(rows(0, 3 * WIDTH, 0), *empty_plan())
    assert torch.equal(means, torch.zeros(3, WIDTH, dtype=torch.float64)) and relations.shape == (0, WIDTH)
    one = [torch.tensor(v, dtype=torch.int32) for v in ([0, 1, 2, 2], [1, 1, 2], [0, 0])]
    y = torch.tensor([[1.0, -2.0, 3.0]])  # relation 0: object 0 -> object 1; object 2 is alone
    means, relations = reference.scatter_mean(y, *one)
    assert means.tolist() == [[1.0], [3.0], [0.0]] and relations.tolist() == [[0.0]]


def test_masked_pool(batch):
    x, r = rows(batch.num_objects, WIDTH, 0), rows(batch.num_relations, WIDTH, 1)
    found = reference.masked_pool(
        x, r, batch.object_ptr, batch.relation_ptr, batch.object_pooled, batch.relation_pooled
    )
    n = e = 0
    for b, graph in enumerate(all_graphs()):
        objects = list(x[n : n + len(graph.objects)])
        relations = list(r[e : e + len(graph.relations)])
        expected = torch.cat([loops.mean(objects, WIDTH), loops.mean(relations, WIDTH)])
        torch.testing.assert_close(found[b], expected)
        n, e = n + len(graph.objects) + 1, e + len(graph.relations) + len(graph.objects)
    without = list(GRAPHS).index("no_relations")
    assert not found[without, WIDTH:].any() and found[without, :WIDTH].any()


def test_masked_pool_of_nothing_is_zero():
    ptr = torch.tensor([0, 2, 2], dtype=torch.int32)
    mask = torch.zeros(2, dtype=torch.uint8)
    assert not reference.masked_pool(rows(2, 3, 0), rows(2, 3, 1), ptr, ptr, mask, mask).any()


def test_graph_mean(batch):
    r = rows(batch.num_relations, WIDTH, 0)
    found, e = reference.graph_mean(r, batch.relation_ptr), 0
    for b, graph in enumerate(all_graphs()):
        num = len(graph.relations) + len(graph.objects)
        torch.testing.assert_close(found[b], loops.mean(list(r[e : e + num]), WIDTH))
        e += num
    empty = torch.tensor([0, 0, 2], dtype=torch.int32)
    assert not reference.graph_mean(r[:2], empty)[0].any()


def test_triple_context(batch):
    s, o, r = rows(batch.num_objects, 4, 0), rows(batch.num_objects, 4, 1), rows(batch.num_relations, 4, 2)
    pool, bias = rows(batch.num_graphs, 4, 3), rows(1, 4, 4)[0]
    found = reference.triple_context(s, r, o, pool, batch.subject, batch.object, batch.relation_graph, bias)
    e = 0
    for b, graph in enumerate(all_graphs()):
        for _ in range(len(graph.relations) + len(graph.objects)):
            expected = s[batch.subject[e]] + r[e] + o[batch.object[e]] + pool[b] + bias
            torch.testing.assert_close(found[e], expected)
            e += 1
    assert e == batch.num_relations


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(batch, dtype):
    """Sums run in fp32: the result is the exact one rounded, to within an ulp and fp32's own error."""
    exact_ulp = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}[dtype]
    y = rows(batch.num_relations, 3 * WIDTH, 0, dtype)
    means, relations = reference.scatter_mean(y, *batch.plan)
    exact, _ = reference.scatter_mean(y.double(), *batch.plan)
    assert means.dtype == relations.dtype == dtype
    torch.testing.assert_close(means.double(), exact, rtol=exact_ulp, atol=1e-6)
    a, c = rows(batch.num_objects, 5, 0, dtype), rows(batch.num_objects, 5, 1, dtype)
    b, bias = rows(batch.num_relations, 5, 2, dtype), rows(1, 5, 3, dtype)[0]
    found = reference.gather_add_relu(a, b, c, bias, batch.subject, batch.object)
    exact = reference.gather_add_relu(a.double(), b.double(), c.double(), bias.double(), batch.subject, batch.object)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=exact_ulp, atol=1e-6)


def away_from_zero(x: torch.Tensor) -> torch.Tensor:
    """A relu has no derivative at 0: keep finite differences off it."""
    return torch.where(x.abs() < 0.05, x + 0.1, x)


def small() -> SceneGraphBatch:
    return pack(GRAPHS["duplicates"], GRAPHS["one_object"], GRAPHS["no_relations"])[0]


def test_gradients_of_gather_add_relu():
    batch = small()
    s, o = batch.subject, batch.object
    a, c, b = rows(batch.num_objects, 2, 0), rows(batch.num_objects, 2, 1), rows(batch.num_relations, 2, 2)
    bias = rows(1, 2, 3)[0]
    b = b + away_from_zero(a[s] + b + c[o] + bias) - (a[s] + b + c[o] + bias)
    inputs = [t.requires_grad_() for t in (a, b, c, bias)]
    assert torch.autograd.gradcheck(lambda *t: reference.gather_add_relu(*t, s, o), inputs, eps=1e-6)


def test_gradients_of_scatter_mean():
    batch = small()
    y, bias, residual = rows(batch.num_relations, 6, 0), rows(1, 6, 1)[0], rows(batch.num_relations, 2, 2)
    y = away_from_zero(y + bias) - bias
    inputs = [t.requires_grad_() for t in (y, bias, residual)]
    assert torch.autograd.gradcheck(lambda y, b, r: reference.scatter_mean(y, *batch.plan, b, r), inputs)


def test_gradients_of_graph_mean():
    batch = small()
    r = rows(batch.num_relations, 2, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: reference.graph_mean(t, batch.relation_ptr), [r])


def test_gradients_of_masked_pool():
    batch = small()
    inputs = [rows(n, 2, i).requires_grad_() for i, n in enumerate((batch.num_objects, batch.num_relations))]
    masks = batch.object_pooled, batch.relation_pooled
    assert torch.autograd.gradcheck(
        lambda x, r: reference.masked_pool(x, r, batch.object_ptr, batch.relation_ptr, *masks), inputs
    )


def test_gradients_of_triple_context():
    batch = small()
    num = (batch.num_objects, batch.num_relations, batch.num_objects, batch.num_graphs)
    inputs = [rows(n, 2, i).requires_grad_() for i, n in enumerate(num)] + [rows(1, 2, 9)[0].requires_grad_()]
    index = batch.subject, batch.object, batch.relation_graph
    assert torch.autograd.gradcheck(lambda *t: reference.triple_context(*t[:4], *index, t[4]), inputs)
