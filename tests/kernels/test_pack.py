"""`pack`: against graphs packed one by one, against loops, and Triton against the reference bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgg_kernels import launch as launching
from sgg_kernels.reference.pack import MASK_STREAM, STORE_FIELDS
from support import loops
from support.kernels.packed import CASES, LIST, assert_same, draw, fields, store_of, totals

from sgg_fast import ops
from sgg_fast.graph import SceneGraph, SceneGraphBatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", "triton"]


@pytest.fixture
def poisoned():
    """torch.empty gives NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_packed_is_the_graphs_packed_anew(case, backend, device):
    store, table = store_of(LIST, device)
    expected = SceneGraphBatch.from_graphs([LIST[i] for i in CASES[case]], table)
    ops.use_kernels(backend)
    assert_same(ops.pack(store, CASES[case]), expected)
    assert_same(draw(backend, store, np.array(CASES[case]))[0], expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", [(0, 0), (5, 0), (1, 1), (1, 9), (9, 1), (7, 7), (100, 70), (70, 331)])
def test_padding_is_one_more_graph(room, backend, device):
    store, _ = store_of(LIST, device)
    ids = [5, 0, 6]
    num_n, num_e = totals(store, ids)
    ops.use_kernels(backend)
    bare = ops.pack(store, ids)
    padded, masked_N = draw(backend, store, ids, bucket=(num_n + room[0], num_e + room[1]))
    assert padded.num_objects == num_n + room[0] and padded.num_relations == num_e + room[1]
    assert np.array_equal(padded.sizes, [*bare.sizes, room]) and padded.num_graphs == 4
    ends = {"message_slot": 2 * num_e, "message_ptr": num_n + 1, "object_ptr": 4, "relation_ptr": 4, "sizes": 3}
    for name, value in fields(bare).items():
        assert torch.equal(fields(padded)[name][: ends.get(name, len(value))], value), name
    tail_n, tail_e = slice(num_n, None), slice(num_e, None)
    for ends_E in (padded.subject[tail_e], padded.object[tail_e]):
        assert ((ends_E >= num_n) & (ends_E < num_n + room[0])).all()
    assert not padded.object_pooled[tail_n].any() and not padded.relation_pooled[tail_e].any()
    assert not masked_N[tail_n].any() and not padded.object_name[tail_n].any()
    assert (padded.predicate_name[tail_e] == 1).all()
    assert (padded.object_graph[tail_n] == 3).all() and (padded.relation_graph[tail_e] == 3).all()
    plain = {name: fields(padded)[name].numpy() for name in ("object_name", "predicate_name", "subject", "object")}
    anew = SceneGraphBatch.from_arrays(*plain.values(), padded.sizes)  # sorts and counts
    for name in ("object_ptr", "relation_ptr", "message_ptr", "message_mid", "message_slot"):
        assert torch.equal(fields(padded)[name], getattr(anew, name)), name
    degree = padded.message_ptr.diff()[tail_n].tolist() or [0]
    assert max(degree) - min(degree) <= 2, "the padding's relations are spread over its objects"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_mask_against_loops(ratio, backend, device):
    store, _ = store_of(LIST, device)
    ids, first_copy, seed, step = CASES["repeats"], 2, 2**33 + 2**31 + 5, 2**31 + 3
    batch, masked_N = draw(backend, store, ids, ops.MaskDraw(first_copy, ratio, seed, step))
    assert masked_N.dtype == torch.bool and masked_N.shape == (batch.num_objects,)
    for b, i in enumerate(ids):
        num, start = len(LIST[i].objects), int(batch.object_ptr[b])
        hidden = set((masked_N[start : int(batch.object_ptr[b + 1])].nonzero()[:, 0]).tolist())
        if b < first_copy or num == 1:
            assert not hidden
            continue
        assert 1 <= len(hidden) < num and num not in hidden, "one masked, one kept, never the image node"
        assert hidden == loops.masked_objects(num, ratio, seed, step, i, MASK_STREAM)


@st.composite
def graph_lists(draw) -> list[SceneGraph]:
    graphs = []
    for _ in range(draw(st.integers(1, 4))):
        num = draw(st.integers(1, 9))
        ends = st.tuples(st.integers(0, num - 1), st.integers(0, num - 1)).filter(lambda p: p[0] != p[1])
        pairs = draw(st.lists(ends, max_size=12)) if num > 1 else []
        graphs.append(SceneGraph(tuple("xyz"[i % 3] for i in range(num)), tuple((s, "p", o) for s, o in pairs)))
    return graphs


@settings(max_examples=15, deadline=None, derandomize=True)
@given(graph_lists(), st.data())
def test_triton_is_the_reference_bit_for_bit(graphs, data):
    store, table = store_of(graphs)
    ids = data.draw(st.lists(st.integers(0, len(graphs) - 1), min_size=1, max_size=5))
    mask = ops.MaskDraw(
        data.draw(st.integers(0, len(ids))), data.draw(st.integers(0, 20)) / 20,
        data.draw(st.integers(0, 2**32)), data.draw(st.integers(0, 2**31 - 1)),
    )  # fmt: skip
    num_n, num_e = totals(store, ids)
    room = data.draw(st.none() | st.tuples(st.integers(1, 20), st.integers(0, 20)))
    bucket = None if room is None else (num_n + room[0], num_e + room[1])
    expected, masked_N = draw("reference", store, ids, mask, bucket)
    for _ in range(2):
        found, found_N = draw("triton", store, ids, mask, bucket)
        assert_same(found, expected)
        assert torch.equal(found_N, masked_N)
    if bucket is None:
        assert_same(found, SceneGraphBatch.from_graphs([graphs[i] for i in ids], table))


def test_one_launch_and_none_for_the_reference():
    store, _ = store_of(LIST)
    for backend, expected in (("triton", ["pack_fwd_kernel"]), ("reference", [])):
        seen = []
        with launching.intercept(lambda kernel, *rest, seen=seen: seen.append(kernel.__name__) or False):
            draw(backend, store, [0, 1], bucket=(50, 50))
        assert seen == expected


def test_without_its_launch_nothing_is_right():
    """The comparisons above see the kernel's work: with the launch swallowed, nothing agrees."""
    store, table = store_of(LIST)
    torch.use_deterministic_algorithms(True)
    try:
        with launching.intercept(lambda *_: True):
            found, _ = draw("triton", store, [0, 1])
    finally:
        torch.use_deterministic_algorithms(False)
    expected = SceneGraphBatch.from_graphs(LIST[:2], table)
    for name in ("object_name", "subject", "message_ptr", "message_slot", "object_graph", "relation_pooled"):
        assert not torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.gpu
def test_captured_launch_follows_its_inputs_without_a_sync():
    """New ids, offsets and step in the same device tensors: a replay draws the new batch."""
    from sgg_kernels.pack import pack_fwd
    from sgg_kernels.reference.pack import MaskKey

    store, _ = store_of(LIST, "cuda")
    tensors = {name: getattr(store, name) for name in STORE_FIELDS}
    num_n, num_e = 90, 260

    def host(ids: list[int]) -> list[torch.Tensor]:
        sizes = store.sizes[ids]
        sizes = np.concatenate([[[0, 0]], sizes, [[num_n, num_e] - sizes.sum(axis=0)]]).cumsum(axis=0)
        return [torch.tensor(v, dtype=torch.int32) for v in (ids, sizes[:, 0], sizes[:, 1], [sum(ids)])]

    inputs = [t.cuda() for t in host([0, 1, 2])]

    def run() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return pack_fwd(tensors, *inputs[:3], num_n, num_e, MaskKey(0, 300_000, 3, inputs[3]))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, masked_N = run()
    for ids in ([0, 1, 2], [7, 4, 3]):
        for t, value in zip(inputs, host(ids), strict=True):
            t.copy_(value)
        torch.cuda.set_sync_debug_mode("error")
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        bucket = (num_n, num_e)
        expected, expected_N = draw("reference", store, ids, ops.MaskDraw(0, 0.3, 3, sum(ids)), bucket)
        assert torch.equal(masked_N, expected_N)
        for name, value in out.items():
            assert torch.equal(value, getattr(expected, name)), name
