"""`exchange_ends`: the plan of relations turned round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.graphs import all_graphs, pack

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch


def roles(batch: SceneGraphBatch) -> list[tuple[set[int], set[int]]]:
    """Of every object, the relations that it is subject and object of, by the plan."""
    ptr, mid, slot = (x.tolist() for x in batch.plan)
    return [(set(slot[ptr[i] : mid[i]]), set(slot[mid[i] : ptr[i + 1]])) for i in range(len(mid))]


@pytest.mark.parametrize("padded", [False, True])
def test_exchanged_ends_make_the_plan_of_the_exchanged_graph(padded):
    store, _ = pack(*all_graphs())
    batch = ops.pack(store, range(len(all_graphs())), bucket=(60, 90) if padded else None)
    before = {name: tensor.clone() for name, tensor in vars(batch).items() if isinstance(tensor, torch.Tensor)}
    chosen = torch.rand(batch.num_relations, generator=torch.Generator().manual_seed(1)) < 0.5
    found = ops.exchange_ends(batch, chosen)
    assert 3 < chosen[batch.relation_pooled.bool()].sum() < batch.relation_pooled.sum()
    subject, object_ = (x.numpy().astype(np.int64) for x in (batch.subject, batch.object))
    swap = chosen.numpy()
    subject, object_ = np.where(swap, object_, subject), np.where(swap, subject, object_)
    assert found.subject.tolist() == subject.tolist() and found.object.tolist() == object_.tolist()
    assert roles(found) == [
        (set(np.flatnonzero(subject == i).tolist()), set(np.flatnonzero(object_ == i).tolist()))
        for i in range(batch.num_objects)
    ]
    assert sorted(found.message_slot.tolist()) == sorted(batch.message_slot.tolist())
    for name, tensor in before.items():
        assert torch.equal(getattr(batch, name), tensor), "what was given is left alone"
        assert getattr(found, name).dtype == tensor.dtype
