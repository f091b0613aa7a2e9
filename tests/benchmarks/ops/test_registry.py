"""Inputs of the benchmarks: functions of the seed, valid graphs of the sizes that they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cases.benchmark import small_case

from benchmarks.ops import cases, registry
from benchmarks.ops.cases import Case


@pytest.mark.parametrize("op", cases.OPS)
def test_inputs_are_a_function_of_the_seed(op):
    registry.graphs.cache_clear()
    first = registry.inputs(small_case(op), "cpu", seed=3)
    registry.graphs.cache_clear()
    second, other = registry.inputs(small_case(op), "cpu", seed=3), registry.inputs(small_case(op), "cpu", seed=4)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert torch.equal(first.batch.message_slot, second.batch.message_slot) and first.shape == second.shape
    if op == "pack":
        assert torch.equal(first.draw.ids, second.draw.ids)
        assert not torch.equal(first.draw.ids, other.draw.ids)
    elif op == "hash_draw":
        assert torch.equal(first.index["sample"], second.index["sample"])
        assert not torch.equal(first.index["sample"], other.index["sample"])
    else:
        name = next(iter(first.tensors))
        assert first.tensors[name].shape != other.tensors[name].shape or not torch.equal(
            first.tensors[name], other.tensors[name]
        )


@pytest.mark.parametrize("size", ["tiny", "paper", "vg2", "vg16", "1e4"])
def test_graphs_are_valid(size):
    batch = registry.graphs(size)
    subject, object_ = batch.subject.long(), batch.object.long()
    assert torch.equal(batch.object_graph[subject], batch.relation_graph)
    assert torch.equal(batch.object_graph[object_], batch.relation_graph)
    num_objects, degree = batch.num_objects, batch.message_ptr.diff().long()
    assert torch.equal(degree, torch.bincount(torch.cat([subject, object_]), minlength=num_objects))
    assert batch.object_ptr[-1] == num_objects and batch.relation_ptr[-1] == batch.num_relations
    position = torch.repeat_interleave(torch.arange(num_objects), degree)
    as_subject = torch.arange(len(position)) < batch.message_mid[position]
    slot = batch.message_slot.long()
    assert torch.equal(torch.where(as_subject, subject[slot], object_[slot]), position)
    if size == "paper":
        assert (num_objects, batch.num_relations) == registry.BUCKET
    elif size.startswith("1e"):
        assert batch.num_relations == round(float(size))
        assert degree.max() > 5 * degree.double().mean()  # hubs


def test_sizes_follow_visual_genome():
    sizes = registry.sizes_like_visual_genome(20_000, np.random.default_rng(0))
    assert sizes.min(0).tolist() == [3, 1] and sizes.max(0).tolist() == [30, 30]
    assert sizes.mean(0) == pytest.approx([10, 5.5], abs=0.3)
    assert np.corrcoef(sizes.T)[0, 1] > 0.3  # busier pictures have more of both


def test_a_shape_names_its_numbers():
    """As the rows of the CSV and the tables show it."""
    given = registry.inputs(Case("scatter_mean", "fwd", "paper", "fp32"), "meta")
    assert str(given.shape) == "B=5 N=128 E=256 D=512"
    assert given.shape.pooled_objects < given.shape.objects, "the image nodes are in no pool"
    assert str(registry.inputs(Case("geglu", "fwd", "paper", "fp32"), "meta").shape) == "B=2 S=1024 C=1280"


def test_incoming_gradients_are_a_function_of_the_outputs_number():
    def made(number: int, seed: int = 0) -> torch.Tensor:
        return registry.upstream((4, 5), torch.float32, torch.device("cpu"), number, seed)

    assert torch.equal(made(1), made(1)) and made(1).abs().max() > 0
    assert not torch.equal(made(1), made(2)) and not torch.equal(made(1), made(1, seed=1))
    assert registry.upstream((4, 5), torch.bfloat16, torch.device("meta"), 0).is_meta
