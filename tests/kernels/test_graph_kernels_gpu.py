"""What only shows on large inputs and under capture; the same bodies run tiny through the interpreter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from filelock import FileLock
from support.cases.graph import OPS, assert_within_rule, call, evaluate, inputs_of, random_batch

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch

RUN = 100
"""Relations of each object, all of them loops, and each object is a graph of its own."""


def loops(num_objects: int, device: str) -> SceneGraphBatch:
    """A batch in closed form, so that the end of a huge one can be computed alone."""
    num_relations = num_objects * RUN
    end_E = torch.arange(num_relations, dtype=torch.int32, device=device) // RUN
    object_N = torch.arange(num_objects, dtype=torch.int32, device=device)
    ptr_N1 = torch.arange(num_objects + 1, dtype=torch.int32, device=device)
    slot_NR = torch.arange(num_relations, dtype=torch.int32, device=device).view(num_objects, RUN)
    sizes = np.tile([1, RUN], (num_objects, 1))
    return SceneGraphBatch(
        object_name=object_N, predicate_name=end_E, phrase=end_E, subject=end_E, object=end_E, object_ptr=ptr_N1,
        relation_ptr=ptr_N1 * RUN, message_ptr=ptr_N1 * (2 * RUN), message_mid=object_N * (2 * RUN) + RUN,
        message_slot=slot_NR.repeat(1, 2).flatten(), object_graph=object_N, relation_graph=end_E,
        object_pooled=torch.ones_like(object_N, dtype=torch.uint8),
        relation_pooled=(end_E % 2 == 0).to(torch.uint8), sizes=sizes,
    )  # fmt: skip


LARGE = {"gather_add_relu": 1800, "scatter_mean": 700, "masked_pool": 1800, "graph_mean": 1800, "triple_context": 1800}
"""Width such that 12 000 objects' relations have more than 2^31 elements (3D of them in scatter_mean)."""


@pytest.fixture
def card(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Under pytest -n one test at a time holds 9 to 18 GB, and gives them back: five at once do not fit 24 GB."""
    base = tmp_path_factory.getbasetemp()
    with FileLock((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "card.lock"):
        yield
        if device == "cuda":
            torch.cuda.empty_cache()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("op", LARGE)
@pytest.mark.parametrize(
    ("device", "num_objects", "width"),
    [
        pytest.param("cpu", 6, 8, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="runs at full size")),
        pytest.param("cuda", 12_000, None, marks=pytest.mark.gpu),
    ],
)
def test_more_than_2_31_elements(op, device, num_objects, width):
    """The last rows of a tensor of more than 2^31 elements, forward and backward, equal those computed alone."""
    width, tail = width or LARGE[op], 3
    whole, alone = loops(num_objects, device), loops(tail, device)
    alone = dataclasses.replace(alone, relation_pooled=whole.relation_pooled[-tail * RUN :])
    small = {k: x.to(device) for k, x in inputs_of(op, alone, width, torch.bfloat16).items()}
    rows = {tail: num_objects, tail * RUN: num_objects * RUN}
    large = {}
    for name, x in small.items():
        large[name] = x.new_zeros(rows[len(x)], *x.shape[1:]) if name != "bias" else x
        large[name][-len(x) :] = x
    assert device == "cpu" or max(x.numel() for x in large.values()) > 2**31

    found = {}
    for name, inputs, batch in (("whole", large, whole), ("alone", small, alone)):
        ops.use_kernels("triton" if name == "whole" else "reference")
        leaves = {k: x.requires_grad_() for k, x in inputs.items()}
        outputs = call(op, leaves, batch)
        (
            sum(out[-len(out) * tail // num_objects if name == "whole" else 0 :].float().sum() for out in outputs)
        ).backward()
        ops.use_kernels("auto")
        found[name] = [*outputs, *(x.grad for k, x in leaves.items() if k != "bias")]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one[-len(other) :], other, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_captured_in_a_cuda_graph(op):
    """Forward and backward replay on new values: no host synchronisation, no host-side decision on data."""
    batch = random_batch([(9, 40), (30, 700)], seed=1).to("cuda")
    inputs = {k: x.to("cuda").requires_grad_() for k, x in inputs_of(op, batch, 64).items()}

    def step() -> list[torch.Tensor]:
        outputs = call(op, inputs, batch)
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), list(inputs.values()))]

    ops.use_kernels("triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs.values():
            x.mul_(0.5)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)
    ops.use_kernels("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_many_programs(op):
    """Sizes that fill the card: wide blocks, split runs, several rows a program."""
    batch = random_batch([(3000, 20_000), (1, 2000), (2000, 5000)], seed=2).to("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {k: x.to("cuda") for k, x in inputs_of(op, batch, 520, dtype).items()}
        low, found = (evaluate(backend, op, inputs, batch) for backend in ("reference", "triton"))
        exact = evaluate("reference", op, {k: x.double() for k, x in inputs.items()}, batch)
        assert_within_rule(found, low, exact)
