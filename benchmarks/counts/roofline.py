"""Bytes and operations that each op needs, and the time that a chip's data sheet then predicts.

These are formulas and predictions, not measurements. Compulsory traffic: every input row is read once and every output
row written once, without intermediates. Letters: B images, N objects, E relations, D width; s bytes an element; indices
are int32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.ops.cases import CONTEXT_TOKENS
from benchmarks.ops.registry import ImageShape, Shape

INT = 4
"""Bytes of an index."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of a data sheet, and a latency."""

    name: str
    bytes_per_second: float
    flops: float
    """Dense bf16, fp32 accumulation."""
    sms: int
    clock: float
    """Hz under load; an SM issues four instructions of a warp a clock."""
    latency: float
    """Seconds of a load from memory; assumed, from what others measured on like chips."""


CHIPS = (Chip("RTX 4090", 1008e9, 165e12, 128, 2.5e9, 3e-7), Chip("H200", 4.8e12, 990e12, 132, 1.7e9, 5e-7))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Compulsory work of one pass."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, chip: Chip) -> float:
        """The larger of the two times: a lower bound, not a forecast of a kernel's time."""
        return max(self.bytes / chip.bytes_per_second, self.flops / chip.flops)


def _plan(z: Shape) -> int:
    """ptr [N+1], mid [N], slot [2E]."""
    return INT * (2 * z.objects + 1 + 2 * z.relations)


def _gather_add_relu(z: Shape, s: int, backward: bool) -> Traffic:
    nodes, edges = z.objects * z.width * s, z.relations * z.width * s
    if backward:  # reads the gradient and the sign of the output; writes those of b and ac
        return Traffic(3 * edges + 2 * nodes + _plan(z))
    return Traffic(2 * nodes + 2 * edges + 2 * INT * z.relations)


def _scatter_mean(z: Shape, s: int, backward: bool) -> Traffic:
    nodes, edges = z.objects * z.width * s, z.relations * z.width * s
    if backward:  # reads y (its sign), both gradients, each relation's ends and each object's degree; writes y's
        return Traffic(7 * edges + nodes + INT * (2 * z.relations + z.objects + 1))
    return Traffic(4 * edges + nodes + _plan(z))


def _masked_pool(z: Shape, s: int, backward: bool) -> Traffic:
    """Rows that a mask leaves out need not be read, but their gradient, 0, must be written."""
    rows = z.objects + z.relations if backward else z.pooled_objects + z.pooled_relations
    masks = z.objects + z.relations
    return Traffic(rows * z.width * s + 2 * z.graphs * z.width * s + masks + 2 * INT * (z.graphs + 1))


def _graph_mean(z: Shape, s: int, backward: bool) -> Traffic:
    return Traffic((z.relations + z.graphs) * z.width * s + INT * (z.graphs + 1))


def _triple_context(z: Shape, s: int, backward: bool) -> Traffic:
    wide = 2 * z.width * s
    if backward:  # r's gradient is the incoming one itself
        return Traffic((2 * z.objects + z.relations + z.graphs) * wide + _plan(z) + INT * (z.graphs + 1))
    return Traffic((2 * z.objects + 2 * z.relations + z.graphs) * wide + 3 * INT * z.relations)


def _pack(z: Shape, s: int, backward: bool) -> Traffic:
    """Names, predicates, phrases, ends, plan, pooled flags copied; graph numbers and the mask written."""
    assert not backward, "integers have no gradient"
    objects = z.objects * (2 * (3 * INT + 1) + INT + 1)
    relations = z.relations * (2 * (6 * INT + 1) + INT)
    return Traffic(objects + relations + 6 * INT * (z.graphs + 1))


def _layer(z: Shape, s: int, backward: bool) -> Traffic:
    """x, r and the eight D x D weights once, no intermediate: the traffic of one perfect kernel."""
    rows, weights = (z.objects + z.relations) * z.width * s, (8 * z.width**2 + 6 * z.width) * s
    flops = 2 * z.width**2 * (4 * z.objects + 4 * z.relations)
    if backward:  # x, r, their outputs' gradients and the weights read; as many gradients written
        return Traffic(3 * rows + 2 * weights + _plan(z), 2 * flops)
    return Traffic(2 * rows + weights + _plan(z), flops)


def _group_norm_silu(z: ImageShape, s: int, backward: bool) -> Traffic:
    """Weight and bias read, and their gradients written."""
    image, parameters = z.images * z.pixels * z.width * s, 2 * z.width * s
    return Traffic(3 * image + 2 * parameters if backward else 2 * image + parameters)


def _group_norm_silu_shift(z: ImageShape, s: int, backward: bool) -> Traffic:
    """And the shift read, or its gradient written."""
    return _group_norm_silu(z, s, backward) + Traffic(z.images * z.width * s)


def _add_layer_norm(z: ImageShape, s: int, backward: bool) -> Traffic:
    """x and residual read, sum and norm written; backward, both gradients and the sum read, one gradient written."""
    return Traffic((4 * z.images * z.pixels + (4 if backward else 3)) * z.width * s)


def _cross_attention(z: ImageShape, s: int, backward: bool) -> Traffic:
    """q, k, v read and the result written; backward, its gradient read too and three written."""
    rows, context = z.images * z.pixels * z.width * s, 2 * z.images * CONTEXT_TOKENS * z.width * s
    flops = 4 * z.images * z.pixels * CONTEXT_TOKENS * z.width
    return Traffic(3 * rows + 2 * context, 5 * flops // 2) if backward else Traffic(2 * rows + context, flops)


def _hash_draw(z: ImageShape, s: int, backward: bool) -> Traffic:
    assert not backward, "random numbers have no gradient"
    return Traffic(z.images * z.pixels * z.width * s)


def _geglu(z: ImageShape, s: int, backward: bool) -> Traffic:
    return Traffic((5 if backward else 3) * z.images * z.pixels * z.width * s)


_FORMULAS: dict[str, Callable[..., Traffic]] = {
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_shift": _group_norm_silu_shift,
    "add_layer_norm": _add_layer_norm,
    "cross_attention": _cross_attention,
    "geglu": _geglu,
    "hash_draw": _hash_draw,
    "gather_add_relu": _gather_add_relu,
    "scatter_mean": _scatter_mean,
    "masked_pool": _masked_pool,
    "graph_mean": _graph_mean,
    "triple_context": _triple_context,
    "pack": _pack,
    "layer": _layer,
}


def compulsory(op: str, mode: str, shape: Shape | ImageShape, itemsize: int) -> Traffic:
    """Least bytes and operations of `mode` ("fwd", "bwd" or "fwd_bwd") of `op`."""
    formula = _FORMULAS[op]
    passes = {"fwd": (False,), "bwd": (True,), "fwd_bwd": (False, True)}[mode]
    total = Traffic(0)
    for backward in passes:
        total = total + formula(shape, itemsize, backward)
    return total


def _programs(num_rows: int, block: int) -> int:
    """Programs of a kernel that gives each program as many blocks of rows as keep the programs within MAX_PARTIALS."""
    from sgg_kernels.segments import MAX_PARTIALS

    per_program = -(-max(1, -(-num_rows // MAX_PARTIALS)) // block) * block
    return -(-num_rows // per_program)


def issued(op: str, backward: bool, shape: Shape | ImageShape, itemsize: int) -> int:
    """Bytes that our kernels of one op request, as if there were no cache: every gathered row counts each time.

    The L2 can catch traffic between this and the compulsory bytes: a graph's rows are neighbours. The two-stage sums of
    hubs (under 1 % at E = 1e6, none at the paper's sizes) are left out.
    """
    if isinstance(shape, ImageShape):
        # A norm reads its inputs twice: for their sums, which are left out, and to apply them.
        again = (2 if backward else 1) * shape.images * shape.pixels * shape.width * itemsize
        least = compulsory(op, "bwd" if backward else "fwd", shape, itemsize).bytes
        return least + (again if op.startswith("group_norm_silu") else 0)
    from sgg_kernels.scatter_mean import ROWS

    z, s = shape, itemsize
    nodes, edges, wide = z.objects * z.width * s, z.relations * z.width * s, 2 * z.relations * z.width * s
    ends, plan = 2 * INT * z.relations, _plan(z)
    # Rows between the two stages of a bias gradient, one for each program; fp32, written and read.
    rows_of_objects = 2 * 4 * z.width * _programs(z.objects, 1)
    rows_of_relations = 2 * 4 * 3 * z.width * _programs(z.relations, ROWS)
    pooled = (z.pooled_objects + z.pooled_relations) * z.width * s
    pool_index = z.objects + z.relations + 2 * INT * (2 * z.graphs + 1)
    forward = {
        "gather_add_relu": 4 * edges + ends,
        "scatter_mean": 4 * edges + nodes + plan,
        "masked_pool": pooled + 2 * z.graphs * z.width * s + pool_index,
        "graph_mean": edges + z.graphs * z.width * s + INT * (2 * z.graphs + 1),
        "triple_context": 5 * wide + 3 * INT * z.relations,
        "pack": compulsory("pack", "fwd", z, s).bytes,
    }
    behind = {
        "gather_add_relu": 5 * edges + 2 * nodes + rows_of_objects + plan,
        "scatter_mean": 9 * edges + rows_of_relations + 3 * ends,
        "masked_pool": pooled + (z.objects + z.relations) * (z.width * s + INT) + pool_index,
        "graph_mean": 2 * edges + INT * z.relations,
        "triple_context": 3 * wide + 4 * nodes + 2 * z.graphs * z.width * s + 2 * rows_of_objects + plan,
    }
    return (behind if backward else forward)[op]
