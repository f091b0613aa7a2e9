"""Padding is inert: the pre-training step and the condition of a bucket are those of the bare batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.graphs import all_graphs

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.data.cache import TrainingCache
from sgg_fast.graph import NameTable, SceneGraphBatch
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.train.stages import PretrainStage

WIDTH = 12
IDS = np.array([1, 6, 4, 3])
ROOMS = [(0, 0), (1, 1), (3, 17), (30, 5)]


def rows(num: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def cache() -> TrainingCache:
    """Every awkward graph; the last name belongs to no graph."""
    table = NameTable()
    graphs = SceneGraphBatch.from_graphs(all_graphs(), table)
    table.add("of no graph")
    return TrainingCache(graphs, table, rows(len(table), WIDTH, 0), rows(graphs.num_graphs, 6, 1), None)


def stage() -> PretrainStage:
    torch.manual_seed(0)
    conditioner = SceneGraphConditioner(name_dim=WIDTH, image_dim=6, context_dim=8, width=WIDTH, num_layers=2)
    return PretrainStage(Config().replace(width=WIDTH, num_layers=2, geometry=0.0), conditioner, cache())


def bucket_for(store: SceneGraphBatch, ids: np.ndarray, room: tuple[int, int]) -> tuple[int, int]:
    num_n, num_e = store.sizes[ids].sum(axis=0)
    return int(num_n) + room[0], int(num_e) + room[1]


def step_of(
    model: PretrainStage, bucket: tuple[int, int] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    total = model(IDS, 3, bucket).total
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("room", "garbage"), [*((room, True) for room in ROOMS), ((3, 17), False)])
def test_pretraining_step(room, garbage, backend, monkeypatch):
    """Loss and every gradient; with garbage, the padding's names are large random numbers."""
    ops.use_kernels(backend)
    model = stage()
    loss, grads = step_of(model)
    assert len(grads) > 30
    plain, bucket = ops.pack_masked, bucket_for(model.cache.graphs, np.tile(IDS, model.copies), room)

    def padded(*args, **options) -> tuple[SceneGraphBatch, torch.Tensor]:
        batch, masked_N = plain(*args, **options)
        ids = args[1]
        assert batch.num_graphs == len(ids) + 1
        if garbage:
            batch.object_name[batch.num_objects - room[0] :] = len(model.cache.names) - 1
            batch.predicate_name[batch.num_relations - room[1] :] = len(model.cache.names) - 1
        return batch, masked_N

    model._frozen[0][-1] *= 1e3
    monkeypatch.setattr(ops, "pack_masked", padded)
    found_loss, found = step_of(model, bucket)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("room", ROOMS)
def test_no_real_graph_reads_the_padding(room, backend):
    """NaN in the padding's names reaches nothing of the real graphs."""
    ops.use_kernels(backend)
    model, store = stage(), cache().graphs
    names = model._frozen[0].clone()
    names[-1] = float("nan")
    bare = model.conditioner(names, ops.pack(store, IDS))
    batch = ops.pack(store, IDS, bucket=bucket_for(store, IDS, room))
    batch.object_name[batch.num_objects - room[0] :] = len(names) - 1
    batch.predicate_name[batch.num_relations - room[1] :] = len(names) - 1
    found = model.conditioner(names, batch)
    assert found.context.shape == (len(IDS) + 1, 80, 8)
    torch.testing.assert_close(found.context[:-1], bare.context, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.x_global[:-1], bare.x_global, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.mask[:-1], bare.mask)
    assert found.x_global[-1].isnan().any() == (room[1] > 0), "the poison was there"
