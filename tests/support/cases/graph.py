"""What the tests of the graph kernels share: awkward batches, each op with its inputs, and the tolerance rule.

Letters: N objects, E relations, B graphs, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch
from support import graphs

Tensors = dict[str, torch.Tensor]


def batch_of(subject: np.ndarray, object_: np.ndarray, sizes: list[tuple[int, int]], seed: int = 0) -> SceneGraphBatch:
    """A batch with these ends (any order, loops allowed) and [B, 2] sizes; about a third of its rows is masked."""
    sizes_B2 = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    num_n, num_e = sizes_B2.sum(0)
    zeros = np.zeros(num_n, np.int64), np.zeros(num_e, np.int64)
    batch = SceneGraphBatch.from_arrays(*zeros, subject, object_, sizes_B2)
    rng = np.random.default_rng(seed)
    masks = (torch.from_numpy((rng.random(num) < 0.7).astype(np.uint8)) for num in (num_n, num_e))
    return dataclasses.replace(batch, object_pooled=next(masks), relation_pooled=next(masks))


def random_batch(sizes: list[tuple[int, int]], seed: int = 0) -> SceneGraphBatch:
    """Ends drawn uniformly within each graph, in no order."""
    rng = np.random.default_rng(seed)
    ends, first = [], 0
    for num_n, num_e in sizes:
        ends.append(rng.integers(first, first + max(num_n, 1), (2, num_e)))
        first += num_n
    subject, object_ = np.concatenate(ends, axis=1)
    return batch_of(subject, object_, sizes, seed)


def _hub_batch() -> SceneGraphBatch:
    """560 relations, so that runs are split: object 0 is subject of 200 of them, object 3 the object of 300."""
    rng = np.random.default_rng(5)
    subject, object_ = rng.integers(0, 6, (2, 560))
    subject[rng.permutation(560)[:200]] = 0
    object_[rng.permutation(560)[:300]] = 3
    subject[555:], object_[555:] = rng.integers(6, 8, (2, 5))  # a second, small graph
    return batch_of(subject, object_, [(6, 555), (2, 5)], seed=5)


def _masked_out() -> SceneGraphBatch:
    """A graph none of whose rows counts, between two others."""
    batch = random_batch([(3, 4), (2, 3), (4, 5)], seed=2)
    batch.object_pooled[3:5] = 0
    batch.relation_pooled[4:7] = 0
    return batch


BATCHES: dict[str, Callable[[], SceneGraphBatch]] = {
    "scenes": lambda: graphs.pack(*graphs.all_graphs())[0],
    "unsorted": lambda: random_batch([(5, 17), (1, 3), (9, 40)], seed=1),
    "no_relations": lambda: random_batch([(2, 0), (1, 0)]),
    "empty_groups": lambda: random_batch([(3, 4), (0, 0), (40, 6), (2, 0)], seed=3),
    "masked_out": _masked_out,
    "hub": _hub_batch,
}
"""By what is special about each."""


def randn(seed: int, *shape: int) -> torch.Tensor:
    """fp32 standard normal, the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _shapes(b: SceneGraphBatch, d: int) -> dict[str, dict[str, tuple[int, ...]]]:
    n, e, g = b.num_objects, b.num_relations, b.num_graphs
    return {
        "gather_add_relu": {"ac": (n, 2 * d), "b": (e, d), "bias": (d,)},
        "scatter_mean": {"y": (e, 3 * d), "bias": (3 * d,)},
        "scatter_mean_residual": {"y": (e, 3 * d), "bias": (3 * d,), "residual": (e, d)},
        "masked_pool": {"x": (n, d), "r": (e, d)},
        "graph_mean": {"rows": (e, d)},
        "triple_context": {"s": (n, d), "r": (e, d), "o": (n, d), "pool": (g, d), "bias": (d,)},
    }


OPS = ("gather_add_relu", "scatter_mean", "scatter_mean_residual", "masked_pool", "graph_mean", "triple_context")


def inputs_of(op: str, batch: SceneGraphBatch, width: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """The floating arguments of `op` by name."""
    shapes = _shapes(batch, width)[op]
    return {name: randn(i, *shape).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def call(op: str, t: Tensors, b: SceneGraphBatch) -> tuple[torch.Tensor, ...]:
    """`op` through `sgg_fast.ops`, on the backend in force."""
    if op == "gather_add_relu":
        return (ops.gather_add_relu(t["ac"], t["b"], t["bias"], b),)
    if op.startswith("scatter_mean"):
        return ops.scatter_mean(t["y"], t["bias"], b, t.get("residual"))
    if op == "masked_pool":
        return (ops.masked_pool(t["x"], t["r"], b),)
    if op == "graph_mean":
        return (ops.graph_mean(t["rows"], b.relation_ptr, b.relation_graph),)
    assert op == "triple_context"
    return (ops.triple_context(*t.values(), b),)


def evaluate(backend: str, op: str, inputs: Tensors, batch: SceneGraphBatch) -> Tensors:
    """Outputs and the gradient of every input under fixed random cotangents, by name."""
    ops.use_kernels(backend)
    try:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        outputs = call(op, leaves, batch)
        cotangents = [randn(100 + i, *out.shape).to(out) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    finally:
        ops.use_kernels("auto")
    found = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    return found | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_within_rule(found: Tensors, low: Tensors, exact: Tensors) -> None:
    """Error against the exact reference <= 2 x the error of the reference run in the same precision + floor.

    `exact` is float64: in fp32 the reference's own sum over a hub is off by 1e-4.
    """
    assert found.keys() == low.keys() == exact.keys()
    for name, want in exact.items():
        assert (found[name].dtype, found[name].shape) == (low[name].dtype, low[name].shape), name
        if want.numel() == 0:
            continue
        error, allowed = ((x[name].double() - want).abs().max().item() for x in (found, low))
        floor = 1e-6 * (1 + want.abs().max().item())
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, the reference's own is {allowed:.3g}"


def compare(op: str, batch: SceneGraphBatch, width: int, dtype: torch.dtype, device: str, view=lambda x: x) -> None:
    """The Triton form of `op` against the reference, by the tolerance rule; `view` lays the inputs out."""
    batch = batch.to(device)
    inputs = {name: x.to(device) for name, x in inputs_of(op, batch, width, dtype).items()}
    found = evaluate("triton", op, {name: view(x) for name, x in inputs.items()}, batch)
    low = evaluate("reference", op, inputs, batch)
    exact = evaluate("reference", op, {name: x.double() for name, x in inputs.items()}, batch)
    assert_within_rule(found, low, exact)
