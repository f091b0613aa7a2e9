"""Graphs to pack, draws of them into a batch, and the comparison of two batches field by field."""

from __future__ import annotations

import dataclasses

import torch

from sgg_fast import ops
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from support.graphs import GRAPHS, all_graphs

MASK = ops.MaskDraw(first_copy=0, ratio=0.3, seed=3, step=5)


def large_graph(num: int) -> SceneGraph:
    """More objects than a block, with a hub."""
    return SceneGraph(tuple(f"thing {i % 7}" for i in range(num)), tuple((i, "on", i // 9) for i in range(1, num)))


LIST = [*all_graphs(), large_graph(70)]
CASES = {
    "one": [0],
    "one_object": [list(GRAPHS).index("one_object")],
    "all": list(range(len(LIST))),
    "repeats": [3, 7, 3, 4, 4, 0, 3],
}


def store_of(graphs: list[SceneGraph], device: str = "cpu") -> tuple[SceneGraphBatch, NameTable]:
    """The packed store of these graphs, and its names."""
    table = NameTable()
    return SceneGraphBatch.from_graphs(graphs, table).to(device), table


def fields(batch: SceneGraphBatch) -> dict[str, torch.Tensor]:
    """Every field on the CPU."""
    return {f.name: torch.as_tensor(getattr(batch, f.name)).cpu() for f in dataclasses.fields(batch)}


def assert_same(found: SceneGraphBatch, expected: SceneGraphBatch) -> None:
    """Every field has the same values and dtype."""
    for name, value in fields(expected).items():
        assert fields(found)[name].dtype == value.dtype, name
        assert torch.equal(fields(found)[name], value), name


def draw(backend: str, store: SceneGraphBatch, ids: list[int], mask: ops.MaskDraw = MASK, bucket=None):
    """`pack_masked` on that backend."""
    ops.use_kernels(backend)
    return ops.pack_masked(store, ids, mask, bucket=bucket)


def totals(store: SceneGraphBatch, ids: list[int]) -> tuple[int, int]:
    """Objects and relations of these graphs together."""
    num_n, num_e = store.sizes[ids].sum(axis=0)
    return int(num_n), int(num_e)
