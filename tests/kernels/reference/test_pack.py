"""The pure-torch form of `pack`: its indices, counts of masks, masks by loops, and the batch that it makes."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels.reference import mae_mask
from sgg_kernels.reference.pack import (
    BATCH_FIELDS,
    MASK_STREAM,
    STORE_FIELDS,
    MaskKey,
    concat_ranges,
    field_shapes,
    mask_counts,
    pack,
)
from support import loops
from support.kernels.packed import LIST, draw, store_of

from sgg_fast.graph import SceneGraph, SceneGraphBatch


def test_ranges_one_behind_the_other():
    found = concat_ranges(torch.tensor([7, 3, 100, 0]), torch.tensor([2, 0, 3, 1]))
    assert found.tolist() == [7, 8, 100, 101, 102, 0]
    assert concat_ranges(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("ratio_ppm", "counts"),
    [(0, [0, 1, 1, 1, 1]), (300_000, [0, 1, 1, 2, 3]), (500_000, [0, 1, 2, 3, 5]), (1_000_000, [0, 1, 2, 4, 9])],
)
def test_one_is_masked_and_one_kept_and_halves_go_up(ratio_ppm, counts):
    """Of 1, 2, 3, 5 and 10 objects."""
    assert mask_counts(torch.tensor([1, 2, 3, 5, 10]), ratio_ppm).tolist() == counts


def test_masks_by_loops():
    """The first graph is no copy; the image nodes, the last of each graph, stay."""
    ids, numbers = torch.tensor([9, 4, 9]), [3, 1, 7]
    pointer = torch.tensor([0, 4, 6, 14])
    found = mae_mask(ids, pointer, MaskKey(1, 400_000, 8, torch.tensor([6], dtype=torch.int32)))
    hidden = [
        set(found[start : start + num].nonzero()[:, 0].tolist()) for start, num in zip((0, 4, 6), numbers, strict=True)
    ]
    assert hidden == [set(), set(), loops.masked_objects(7, 0.4, 8, 6, 9, MASK_STREAM)] and len(hidden[2]) == 3
    assert not found[[3, 5, 13]].any()


def test_mask_is_uniform_over_objects():
    """2 of 7 objects in each of 4 000 graphs: every object and every pair equally often, to 5 sigma."""
    store, _ = store_of([SceneGraph(tuple("abcdefg"))] * 4000)
    _, masked_N = draw("reference", store, list(range(4000)))
    hidden = masked_N.view(4000, 8)[:, :7].double()
    assert (hidden.sum(1) == 2).all()
    for share, expected in ((hidden.mean(0), 2 / 7), ((hidden.T @ hidden / 4000)[~torch.eye(7, dtype=bool)], 1 / 21)):
        assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_a_batch_is_the_graphs_packed_anew():
    """Fields, lengths and dtypes; a padding graph behind them is made of the reserved names, masked nowhere."""
    store, table = store_of(LIST)
    fields = {name: getattr(store, name) for name in STORE_FIELDS}
    ids = [7, 1, 7]
    expected = SceneGraphBatch.from_graphs([LIST[i] for i in ids], table)
    found, masked_N = pack(fields, torch.tensor(ids), expected.object_ptr, expected.relation_ptr)
    assert not masked_N.any() and tuple(found) == BATCH_FIELDS
    for name, value in found.items():
        assert torch.equal(value, getattr(expected, name)) and value.dtype == getattr(expected, name).dtype, name
    num_n, num_e = expected.num_objects + 3, expected.num_relations + 7
    ends = (
        torch.cat([ptr, ptr.new_tensor([end])])
        for ptr, end in ((expected.object_ptr, num_n), (expected.relation_ptr, num_e))
    )
    padded, masked_N = pack(fields, torch.tensor(ids), *ends, MaskKey(0, 500_000, 1, torch.tensor([2])))
    assert {name: (len(t), t.dtype) for name, t in padded.items()} == field_shapes(num_n, num_e)
    assert masked_N.any() and not masked_N[-3:].any() and not padded["object_pooled"][-3:].any()
    assert padded["object_name"][-3:].tolist() == [0] * 3 and padded["predicate_name"][-7:].tolist() == [1] * 7
    assert padded["subject"][-7:].tolist() == [num_n - 3 + i for i in (0, 0, 1, 1, 2, 2, 2)]
    assert torch.equal(padded["object"][-7:], padded["subject"][-7:])
