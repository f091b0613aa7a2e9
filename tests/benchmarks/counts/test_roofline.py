"""Bytes by formula, held against the tensors and the launches themselves."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import launch, reference
from sgg_kernels.gather_add_relu import gather_add_relu_bwd
from sgg_kernels.reference.pack import STORE_FIELDS
from sgg_kernels.scatter_mean import scatter_mean_bwd
from support.cases.benchmark import FLOAT_OPS, small_case

from benchmarks.counts import roofline
from benchmarks.ops import baselines, cases, registry
from benchmarks.ops.registry import Shape


def _index_bytes(given: registry.Inputs, op: str) -> int:
    if op in cases.IMAGE_OPS:
        return 0
    batch = given.batch
    named = {
        "gather_add_relu": (batch.subject, batch.object),
        "scatter_mean": batch.plan,
        "masked_pool": (batch.object_ptr, batch.relation_ptr, batch.object_pooled, batch.relation_pooled),
        "graph_mean": (batch.relation_ptr,),
        "triple_context": (batch.subject, batch.object, batch.relation_graph),
        "layer": batch.plan,
    }[op]
    return sum(t.nbytes for t in named)


@pytest.mark.parametrize("op", FLOAT_OPS)
def test_compulsory_bytes_are_the_bytes_of_the_tensors(op):
    given = registry.inputs(small_case(op, size="paper"), "cpu")
    outputs = baselines.form(op, "reference")(given, given.tensors)
    moved = sum(t.nbytes for t in (*given.tensors.values(), *outputs)) + _index_bytes(given, op)
    if op == "masked_pool":  # what the masks leave out is not read
        out = (given.shape.objects + given.shape.relations) - (
            given.shape.pooled_objects + given.shape.pooled_relations
        )
        moved -= out * 16 * 4
    assert roofline.compulsory(op, "fwd", given.shape, 4).bytes == moved
    if op in cases.FORWARD_ONLY:
        return
    both = roofline.compulsory(op, "fwd_bwd", given.shape, 4)
    assert both == roofline.compulsory(op, "fwd", given.shape, 4) + roofline.compulsory(op, "bwd", given.shape, 4)


@pytest.mark.parametrize("size", ["paper", "vg64"])
def test_the_bytes_of_pack_are_those_of_its_fields(size):
    given = registry.inputs(small_case("pack", size=size), "cpu")
    draw = given.draw
    out, masked = reference.pack(draw.store, draw.ids, draw.object_ptr, draw.relation_ptr, draw.mask)
    written = sum(t.nbytes for t in (*out.values(), masked))
    read = sum(t.nbytes for name, t in out.items() if name in STORE_FIELDS)
    graphs = 6 * 4 * (given.shape.graphs + 1)  # each one's place in the store and in the batch
    last = 2 * 4  # message_ptr has an element more than there are objects
    assert roofline.compulsory("pack", "fwd", given.shape, 4).bytes == written + read - last + graphs


@pytest.mark.parametrize("num", [1, 77, 256, 5000, 10**6])
def test_counted_rows_of_a_bias_gradient_are_those_allocated(num):
    """`issued` has a formula for the fp32 rows between the two stages; the launchers have the tensors."""
    width, seen = 8, []

    def see(kernel, grid, args, options):
        given = dict(zip(kernel.arg_names, args, strict=False))
        seen.append((kernel.__name__, given.get("program_sum_ptr", given["partial_ptr"]).numel()))
        return True

    def index(*sizes: int) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=torch.int32, device="meta") for size in sizes]

    def rows(size: int, columns: int) -> torch.Tensor:
        return torch.empty(size, columns, device="meta")

    shape, itemsize = Shape(1, num, num, num, num, width), 4
    with launch.intercept(see):
        scatter_mean_bwd(rows(num, 8), rows(num, 8), rows(num, 24), rows(1, 24)[0], *index(num, num, num + 1))
    streams = 9 * num * width * itemsize + 3 * 2 * 4 * num
    assert seen == [(name, seen[0][1]) for name in ("scatter_mean_bwd_kernel", "column_sum_kernel")]
    assert roofline.issued("scatter_mean", True, shape, itemsize) - streams == 2 * 4 * seen[0][1]
    seen.clear()
    with launch.intercept(see):
        gather_add_relu_bwd(rows(num, 8), rows(num, 8), *index(num, num, num + 1, num, 2 * num), torch.float32)
    streams = 7 * num * width * itemsize + 4 * (2 * num + 1 + 2 * num)
    assert roofline.issued("gather_add_relu", True, shape, itemsize) - streams == 2 * 4 * seen[-1][1]


def test_the_slower_of_bytes_and_operations_decides():
    chip = roofline.Chip("small", 100.0, 1000.0, 1, 1.0, 1.0)
    assert roofline.Traffic(200, 500).seconds(chip) == 2 and roofline.Traffic(20, 500).seconds(chip) == 0.5
