"""`pack` and its kin as callers see them: tables, masks by key, captured draws, counts, and refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sgg_kernels.reference.pack import STORE_FIELDS
from support.kernels.packed import LIST, MASK, draw, large_graph, store_of

from sgg_fast import ops
from sgg_fast.ops.pack import _pack

BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_follows_graph_seed_and_step_not_place(backend):
    store, _ = store_of([large_graph(40)] * 3)
    first = draw(backend, store, [0, 1, 2])[1].view(3, 41)
    moved = draw(backend, store, [2, 2, 0])[1].view(3, 41)
    assert torch.equal(moved, first[[2, 2, 0]]) and not torch.equal(first[0], first[1])
    for other in (dataclasses.replace(MASK, step=6), dataclasses.replace(MASK, seed=4)):
        assert not torch.equal(draw(backend, store, [0, 1, 2], other)[1].view(3, 41)[0], first[0])
    on_device = dataclasses.replace(MASK, step=torch.tensor([5], dtype=torch.int32))
    assert torch.equal(draw(backend, store, [0, 1, 2], on_device)[1].view(3, 41), first)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_captured_pack_is_the_masked_pack(backend):
    """The same batch, whatever stood in the table when the shapes were fixed; bounds in place of sizes."""
    ops.use_kernels(backend)
    store, _ = store_of(LIST)
    bounds = tuple(store.sizes.max(axis=0))
    table = torch.zeros(ops.table_shape(5), dtype=torch.int32)
    for ids, step in (([0, 1, 0, 1], 3), ([6, 4, 6, 4], 2**31 + 1)):
        ops.draw_table(store, ids, step, bucket=(100, 200), out=table)
        mask = ops.MaskDraw(2, 0.3, 11, step)
        found, masked_N = ops.pack_captured(store, table, 4, mask, bucket=(100, 200), bounds=bounds)
        expected, expected_N = ops.pack_masked(store, ids, mask, bucket=(100, 200))
        assert torch.equal(masked_N, expected_N)
        for field in dataclasses.fields(expected):
            if field.name != "sizes":
                assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name
        assert found.sizes.tolist() == [list(bounds)] * 5 and (found.sizes >= expected.sizes)[:4].all()


def test_a_table_holds_what_a_launch_reads():
    """Ids, both pointers and the wrapped step, a row each, of whole 16 bytes and with room for the caller's words."""
    store, _ = store_of(LIST)
    sizes = store.sizes[[2, 0]].tolist()
    table, found = ops.draw_table(store, [2, 0], 2**31 + 1, bucket=(40, 60))
    assert tuple(table.shape) == ops.table_shape(3) == (4, 4) and table.dtype == torch.int32
    padding = [40 - sizes[0][0] - sizes[1][0], 60 - sizes[0][1] - sizes[1][1]]
    assert found.tolist() == [*sizes, padding]
    assert table[0, :2].tolist() == [2, 0] and table[3, 0] == -(2**31) + 1
    for row, end in ((1, 40), (2, 60)):
        first = sizes[0][row - 1]
        assert table[row].tolist() == [0, first, first + sizes[1][row - 1], end]
    for num_graphs, num_words in ((1, 1), (4, 1), (5, 30), (64, 2)):
        rows, words = ops.table_shape(num_graphs, num_words)
        assert rows == 4 and words % 4 == 0 and num_graphs < words >= num_words


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_num_masked_counts_the_masks_of_a_draw(ratio):
    store, _ = store_of(LIST)
    ids = np.arange(len(LIST))
    for seed in (0, 1):
        masked_N = draw("reference", store, ids.tolist(), ops.MaskDraw(0, ratio, seed, 5))[1]
        assert ops.num_masked(store, ids, ratio) == int(masked_N.sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_opcheck(backend, with_mask):
    store, _ = store_of(LIST)
    ids = torch.tensor([1, 3], dtype=torch.int32)
    sizes = torch.from_numpy(np.concatenate([[[0, 0]], store.sizes[[1, 3]], [[5, 6]]]).cumsum(0)).int()
    step = torch.tensor([4], dtype=torch.int32) if with_mask else None
    args = ([getattr(store, name) for name in STORE_FIELDS], ids, sizes[:, 0].contiguous(), sizes[:, 1].contiguous(),
            step, int(sizes[-1, 0]), int(sizes[-1, 1]), 1, 300_000, 7, backend)  # fmt: skip
    torch.library.opcheck(_pack, args)


@pytest.mark.parametrize(
    ("ids", "bucket", "match"),
    [
        ([], None, "at least one"),
        ([0, 99], None, "must lie in"),
        ([-1], None, "must lie in"),
        ([[0]], None, "must lie in"),
        ([0], (3, 99), "a bucket of 3 objects and 99 relations is too small: the graphs have 4 and 5"),
        ([0], (99, 4), "the graphs have 4 and 5"),
        ([0], (4, 6), "relations of padding need an object of padding"),
        ([0], (2**28, 9), "below 268435456"),
    ],
)
def test_errors(ids, bucket, match):
    store, _ = store_of(LIST)
    with pytest.raises(ValueError, match=match):
        ops.pack(store, ids, bucket=bucket)


def test_ratio_outside_0_to_1():
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1"):
        ops.MaskDraw(0, 1.5, 0, 0)
