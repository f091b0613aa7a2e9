"""Counts the launches and bytes of every form, and writes the table in kernels/README.md from them.

    python -m benchmarks.counts            # print
    python -m benchmarks.counts --write    # put the table into kernels/README.md
    python -m benchmarks.counts --check    # exit 1 if the committed table differs

These are counts, not measurements: no GPU was timed. A plain torch form runs on shapes alone (meta tensors) under a
dispatch mode that sees every aten operator; our form runs with its launches intercepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sgg_kernels.launch import intercept
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counts import model, roofline
from benchmarks.counts.roofline import CHIPS
from benchmarks.harness.readme_table import ReadmeTable, markdown
from benchmarks.ops import baselines as baselines_torch
from benchmarks.ops import optimisers
from benchmarks.ops.baselines import OpForm
from benchmarks.ops.cases import FORWARD_ONLY, GRAPH_OPS, IMAGE_OPS, Case
from benchmarks.ops.registry import DTYPES, ImageShape, Inputs, Shape, inputs
from sgg_fast import ops
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import STATES

TABLE_DTYPE = "bf16"
TABLE_SIZES = ("paper", "1e6")


def _dtype(op: str) -> str:
    return FORWARD_ONLY.get(op, TABLE_DTYPE)


_NO_KERNEL = {
    "_unsafe_view", "_reshape_alias", "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh",
    "new_empty", "new_empty_strided", "sym_size", "sym_stride", "_local_scalar_dense", "resolve_conj",
}  # fmt: skip
_WRITES_ONLY = {"zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
                "new_full", "zero_", "fill_"}  # fmt: skip
_GATHERS = {"index", "index_select", "gather", "embedding"}
_ADDS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "_index_put_impl_"}


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Distinct bytes: an expanded dimension is read once."""
    num = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        num *= size if stride != 0 or size == 0 else 1
    return num * tensor.element_size()


def operator_bytes(name: str, arguments: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes that one aten operator reads and writes, each different element once.

    A gather reads the rows that it returns, not its whole table. A scattered sum reads its source and its indices,
    copies its destination unless it works in place, and reads and writes the rows that it adds to.
    """
    written = sum(map(tensor_bytes, outputs))
    if name in _WRITES_ONLY:
        return written
    if name in _GATHERS:
        return 2 * written + sum(tensor_bytes(t) for t in arguments[1:])
    if name in _ADDS:
        target, given = arguments[0], sum(map(tensor_bytes, arguments[1:]))
        source = max((t for t in arguments[1:] if t.dtype == target.dtype), key=tensor_bytes)
        touched = 2 * min(tensor_bytes(source), tensor_bytes(target))
        return given + touched + (0 if name.endswith("_") else 2 * tensor_bytes(target))
    return sum(map(tensor_bytes, arguments)) + written


@dataclasses.dataclass(frozen=True)
class Count:
    """Launches and bytes of one pass."""

    launches: int
    bytes: int
    flops: int = 0
    """Of matrices and convolutions; 0 where they are not counted."""

    def __add__(self, other: Count) -> Count:
        return Count(self.launches + other.launches, self.bytes + other.bytes, self.flops + other.flops)


class OpCounter(TorchDispatchMode):
    """Counts operators that run at least one kernel, by name, and their bytes; our operators by name alone.

    It is a lower bound of the launches: `index_put` with accumulation sorts first, an out-of-place sum copies first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        """Bytes by operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if func.namespace != "aten":
            self.names[func._schema.name] += 1
        elif not func.is_view and name not in _NO_KERNEL:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.names[name] += 1
            self.moved[name] += operator_bytes(name, tensors, outputs)
        return result

    def count(self, names: Iterable[str] | None = None) -> Count:
        """Aten operators with a kernel, all or those of `names`."""
        chosen = [name for name in self.names if "::" not in name and (names is None or name in names)]
        return Count(sum(self.names[name] for name in chosen), sum(self.moved[name] for name in chosen))

    @property
    def ours(self) -> list[str]:
        """Operators of `sgg_fast`, one entry for each call, without the namespace."""
        return [name.split("::")[1] for name, num in self.names.items() if "::" in name for _ in range(num)]


def observe(form: OpForm, given: Inputs, backward: bool) -> list[OpCounter]:
    """Run `form` on `given` under a counter: forward and, separately, backward to every tensor."""
    leaves = {name: t.detach().requires_grad_(backward) for name, t in given.tensors.items()}
    forward, behind = OpCounter(), OpCounter()
    with forward:
        outputs = form(given, leaves)
    if not backward:
        return [forward]
    arriving = [torch.empty_like(o, requires_grad=False) for o in outputs]
    with behind:
        torch.autograd.grad(outputs, list(leaves.values()), arriving)
    return [forward, behind]


@functools.cache
def count_plain(op: str, backend: str, size: str) -> list[Count] | None:
    """[forward, backward] of a plain torch form, by its shapes; None if there is no such form."""
    form = baselines_torch.form(op, backend)
    if form is None:
        return None
    given = inputs(Case(op, "fwd_bwd", size, _dtype(op)), "meta")
    return [counter.count() for counter in observe(form, given, backward=op not in FORWARD_ONLY)]


@contextlib.contextmanager
def triton_everywhere() -> Iterator[None]:
    """Our ops take Triton's path on any device, as the interpreter would; `sgg_fast.ops` refuses that otherwise."""
    before = os.environ.get("TRITON_INTERPRET", "0")
    os.environ["TRITON_INTERPRET"] = "1"
    ops.use_kernels("triton")
    try:
        yield
    finally:
        ops.use_kernels("auto")
        os.environ["TRITON_INTERPRET"] = before


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched inside the block, on any device; none of them runs."""
    seen: list[str] = []

    def take_over(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        seen.append(getattr(kernel, "__name__", str(kernel)))
        return True

    with triton_everywhere(), intercept(take_over):
        yield seen


@functools.cache
def count_kernels(op: str, size: str) -> list[Count]:
    """[forward, backward] of one of our ops: its observed launches, and the bytes that they request, by formula.

    Memory is reserved but never touched, so E = 1e6 costs nothing.
    """
    given = inputs(Case(op, "fwd_bwd", size, _dtype(op)), "cpu", drawn=False)
    form, itemsize = baselines_torch.form(op, "ours"), DTYPES.get(_dtype(op), torch.int32).itemsize
    assert form is not None
    leaves = {name: t.detach().requires_grad_() for name, t in given.tensors.items()}
    with counted_launches() as seen:
        outputs = form(given, leaves)
        num_forward = len(seen)
        if leaves:
            torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs])
    forward = Count(num_forward, roofline.issued(op, False, given.shape, itemsize))
    if not leaves:
        return [forward]
    return [forward, Count(len(seen) - num_forward, roofline.issued(op, True, given.shape, itemsize))]


GEMMS = ("mm", "addmm", "bmm")


@functools.cache
def count_layer(size: str) -> tuple[list[Count], list[Count]]:
    """([forward, backward] of the whole layer on our ops, the share of its GEMMs)."""
    form, case = baselines_torch.form("layer", "ours"), Case("layer", "fwd_bwd", size, TABLE_DTYPE)
    assert form is not None
    given = inputs(case, "meta")
    with counted_launches():
        form(given, given.tensors)  # the module is built on first use
        counters = observe(form, given, backward=True)
    totals = []
    for number, counter in enumerate(counters):
        kernels = [count_kernels(name.removesuffix("_bwd"), size)[number] for name in counter.ours]
        totals.append(sum(kernels, counter.count()))
    return totals, [counter.count(GEMMS) for counter in counters]


def _number(value: float) -> str:
    """Three digits, and no exponent: 0.0414, 9.58, 4,361."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _cell(count: Count | None) -> str:
    return "" if count is None else f"{count.launches} / {_number(count.bytes / 1e6)}"


PASSES = ("forward", "backward")
_MICROSECONDS = [f"{chip.name}, us: {what}" for chip in CHIPS for what in ("least", "ours")]


def _both_times(op: str, number: int, size: str, least: roofline.Traffic) -> list[str]:
    """Cells of `_MICROSECONDS`; no number of ours for an op that the machine does not run."""
    cells = []
    for chip in CHIPS:
        ours = model.seconds(op, ("fwd", "bwd")[number], size, _dtype(op), chip)
        cells += [_number(1e6 * least.seconds(chip)), "" if ours is None else _number(1e6 * ours)]
    return cells


def _least(op: str, number: int, shape: Shape | ImageShape) -> roofline.Traffic:
    itemsize = DTYPES.get(_dtype(op), torch.int32).itemsize
    return roofline.compulsory(op, ("fwd", "bwd")[number], shape, itemsize)


def table(size: str) -> list[str]:
    """One size's table, as lines of Markdown."""
    shape = inputs(Case("scatter_mean", "fwd", size, TABLE_DTYPE), "meta").shape
    rows = []
    for op in GRAPH_OPS:
        if op == "pack":
            continue
        totals, gemms = count_layer(size) if op == "layer" else (count_kernels(op, size), None)
        plain = [count_plain(op, name, size) for name in ("sg2im", "eager")]
        for number, total in enumerate(totals):
            least = _least(op, number, inputs(Case(op, "fwd", size, TABLE_DTYPE), "meta").shape)
            cells = [_cell(found and found[number]) for found in plain]
            least_cell = _number(least.bytes / 1e6) if gemms else _cell(Count(1, least.bytes))
            rows.append([op, PASSES[number], *cells, _cell(total), least_cell, *_both_times(op, number, size, least)])
            if gemms:
                empty = [""] * len(_MICROSECONDS)
                rows.append(["of which GEMMs", PASSES[number], *[""] * len(cells), _cell(gemms[number]), "", *empty])
    header = ["op", "pass", "sg2im's form", "eager", "ours", "least", *_MICROSECONDS]
    return [f"{shape}, {TABLE_DTYPE}; each cell: launches / MB", "", *markdown(header, rows)]


IMAGE_TABLE_SIZES = ("paper", "512px")


def image_table() -> list[str]:
    """Normalisation and gate of the UNet's top level."""
    rows = []
    for op, size in itertools.product(IMAGE_OPS, IMAGE_TABLE_SIZES):
        shape, eager = inputs(Case(op, "fwd", size, _dtype(op)), "meta").shape, count_plain(op, "eager", size)
        for number, ours in enumerate(count_kernels(op, size)):
            least = _least(op, number, shape)
            cells = [_cell(eager and eager[number]), _cell(ours), _cell(Count(1, least.bytes))]
            rows.append([op, str(shape), PASSES[number], *cells, *_both_times(op, number, size, least)])
    header = ["op", "shape", "pass", "eager", "ours", "least", *_MICROSECONDS]
    return [f"{TABLE_DTYPE}; each cell: launches / MB", "", *markdown(header, rows)]


def pack_table() -> list[str]:
    """`pack` at both sizes: integers, one pass, without a rival to compare it with."""
    rows = []
    for size in TABLE_SIZES:
        given = inputs(Case("pack", "fwd", size, "int32"), "cpu")
        (ours,), plain = count_kernels("pack", size), ""
        if size == "paper":
            form = baselines_torch.form("pack", "reference")
            assert form is not None
            plain = _cell(observe(form, given, backward=False)[0].count())
        least, z = _least("pack", 0, given.shape), given.shape
        shape = f"B={z.graphs} N={z.objects} E={z.relations}"
        rows.append([shape, plain, _cell(ours), _cell(Count(1, least.bytes)), *_both_times("pack", 0, size, least)])
    return markdown(["pack", "reference, aten operators", "ours", "least", *_MICROSECONDS], rows)


def launched_by_optimiser(op: str, weights: str) -> list[str]:
    """Kernels of one step of two groups, as in the UNet: matrices, and weights with 32-bit state."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    groups = []
    for state in (STATES[op], {"optim_bits": 32}):
        parameters = optimisers.parameters([(5,), (300,)], dtype, torch.device("cpu"), flat=False)
        groups.append({"params": parameters, "lr": 1e-3, **state})
    made = FlatAdam(groups, seed=0, max_norm=1.0, split=weights == "split")
    with counted_launches() as seen:
        made.step()
    return seen


def optimiser_table() -> list[str]:
    """A step of Stable Diffusion v1's UNet, the norm of its gradients included."""
    num, rows = sum(torch.Size(shape).numel() for shape in optimisers.shapes("unet")), []
    for op, forms in optimisers.BYTES.items():
        for weights, each in forms.items():
            norm = (4 if weights == "fp32" else 2) * optimisers.PASSES.get(op, 1)
            moved = roofline.Traffic(num * (each + norm) + int(num * optimisers.SCALES[op]))
            times = [_number(1e3 * moved.seconds(chip)) for chip in CHIPS]
            cells = [str(len(launched_by_optimiser(op, weights))), str(each), str(norm), _number(moved.bytes / 1e9)]
            rows.append([op, weights, *cells, *times])
    header = ["op", "weights", "launches", "bytes an element", "and norm", "GB", *(f"{c.name}, ms" for c in CHIPS)]
    reads = "*norm* reads each gradient once more; adafactor's includes its means, two reads more"
    return [f"{num:,} weights; {reads}", "", *markdown(header, rows)]


def body() -> str:
    """The text between the markers of the README."""
    blocks = ["\n".join(table(size)) for size in TABLE_SIZES]
    return "\n\n".join([*blocks, *("\n".join(t()) for t in (pack_table, image_table, optimiser_table))])


TABLE = ReadmeTable("counts", "counts", body)
