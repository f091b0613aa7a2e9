"""Factored second moments against formulas in float64 and transformers' Adafactor, interpreted or compiled."""

from __future__ import annotations

import math

import pytest
import torch
from sgg_kernels.reference.adam import APPLIED, CONTROL_SIZE, CORRECTION_1, CORRECTION_2, FACTOR
from sgg_kernels.reference.weights import read_weights
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as op
from sgg_fast.train.optim.adam_state import FlatGroup

BACKENDS = ["reference", "triton"]
SHAPES = {"odd": [(33, 77), (1, 300), (301, 1), (5, 1030)], "eight": [(72, 64), (7, 1032)]}


def group_of(shapes, form: str, device: str) -> FlatGroup:
    """Drawn weights, moments of zero."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    return FlatGroup({"params": parameters, "optim_bits": 32, "factored": True}, 3, form == "split")


def drawn(shapes, step: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients whose rows and columns differ in size, with zeros."""
    generator, made = torch.Generator().manual_seed(step), []
    for rows, columns in shapes:
        sizes = [torch.exp(torch.randn(shape, generator=generator)) for shape in ((rows, 1), (1, columns))]
        grad = 1e-3 * torch.randn(rows, columns, generator=generator) * sizes[0] * sizes[1]
        grad[rows // 2, columns // 2] = 0
        made.append(grad.to(device, dtype))
    return made


def step_by(group: FlatGroup, grads, number: int, factor: float = 1.0) -> None:
    """One applied step of rate 1e-2 by gradients that may be None."""
    device = group.weights.param.device
    given = [(g.flatten(), offset) for g, offset in zip(grads, group.flat.offsets, strict=True) if g is not None]
    flat, offsets = [g for g, _ in given], [offset for _, offset in given]
    backend, hyper = ops.backend_for(device, torch.float32), op.Hyper()
    control = torch.zeros(CONTROL_SIZE)
    control[APPLIED], control[FACTOR] = 1, factor
    control[CORRECTION_1], control[CORRECTION_2] = 1 - hyper.beta_1**number, 1 - hyper.beta_2**number
    table = op.chunk_table(flat, offsets, backend, group.numbers(offsets)).to(device)
    part = op.GroupGrads(flat, offsets, table, group.shapes(offsets))
    step = torch.tensor([number], dtype=torch.int32, device=device)
    rate = torch.tensor([1e-2, 0, 0, 0], device=device)
    op.adam_update_(group.weights, group.moments, part, control.to(device), rate, step, hyper)


def wide_of(group: FlatGroup, index: int, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix in float64."""
    offset = group.flat.offsets[index]
    return read_weights(group.weights, slice(offset, offset + math.prod(shape))).double().view(shape).cpu()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [
        ("fp32", "odd", torch.float32),
        ("split", "eight", torch.bfloat16),
        ("rounded", "odd", torch.bfloat16),
        ("fp32", "eight", torch.bfloat16),
    ],
    ids=["fp32", "split", "rounded", "grad16"],
)
def test_is_the_papers_formula(backend, form, name, dtype, device):
    """Three steps in float64; the second step's gradients are large."""
    ops.use_kernels(backend)
    group = group_of(SHAPES[name], form, device)
    shapes = group.shapes(group.flat.offsets)  # [1, 300] is 300 rows: a dimension of 1 is no dimension
    rows, columns = ([torch.zeros(shape[k], dtype=torch.float64) for shape in shapes] for k in (0, 1))
    for number in (1, 2, 3):
        grads = drawn(shapes, number, device, dtype)
        factor = 50.0 if number == 2 else 0.5
        before = [wide_of(group, i, shape) for i, shape in enumerate(shapes)]
        step_by(group, grads, number, factor)
        for i, grad in enumerate(grads):
            g = factor * grad.cpu().double()
            rows[i] = 0.999 * rows[i] + 0.001 * (g.square().mean(1) + 1e-30)
            columns[i] = 0.999 * columns[i] + 0.001 * (g.square().mean(0) + 1e-30)
            found = group.state_of(i)
            torch.testing.assert_close(found["row_var"].cpu().double(), rows[i], rtol=2e-5, atol=0)
            torch.testing.assert_close(found["col_var"].cpu().double(), columns[i], rtol=2e-5, atol=0)
            v = rows[i][:, None] * columns[i] / rows[i].mean() / (1 - 0.999**number)
            update = g / v.sqrt()
            update /= max(1.0, update.square().mean().sqrt().item())
            # A bf16 number is the one above or the one below.
            rtol, atol = (2**-7, 1e-6) if form == "rounded" else (1e-6, 2e-6)
            torch.testing.assert_close(wide_of(group, i, shapes[i]), before[i] - 1e-2 * update, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_transformers_adafactor(backend, device):
    """Its growing beta_2 is set to Adam's corrected one at each step."""
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    ops.use_kernels(backend)
    shapes = [(40, 24), (24, 100)]
    group = group_of(shapes, "fp32", device)
    theirs = [nn.Parameter(p.detach().clone()) for p in group.flat.parameters]
    settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    other = adafactor(theirs, lr=1e-2, **settings)
    for number in range(1, 6):
        grads = drawn(shapes, number, device, torch.float32)
        grads = [g * 40 if number == 4 else g for g in grads]  # its clipping takes hold
        (their_group,) = other.param_groups
        if number > 1:
            their_group["decay_rate"] = math.log((1 - 0.999) / (1 - 0.999**number)) / math.log(number)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        other.step()
        step_by(group, grads, number)
        for ours, parameter in zip(group.flat.parameters, theirs, strict=True):
            torch.testing.assert_close(ours, parameter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_of_zeros_and_the_least_gradients(backend, device):
    """No division by zero, no movement without a gradient, and a full step for one of 1e-12."""
    ops.use_kernels(backend)
    group = group_of([(40, 64), (16, 300)], "fp32", device)
    before = [p.detach().clone() for p in group.flat.parameters]
    grads = [torch.zeros(40, 64, device=device), torch.full((16, 300), 1e-12, device=device)]
    grads[0][:, 5] = 1e-3
    grads[0][7] = 0
    for number in (1, 2):
        step_by(group, grads, number)
    moved = [a.detach() - b for a, b in zip(group.flat.parameters, before, strict=True)]
    torch.testing.assert_close(moved[0].sign(), -grads[0].sign(), msg="no movement without a gradient")
    torch.testing.assert_close(moved[0] < -1e-3, grads[0] > 0)
    torch.testing.assert_close(moved[1], torch.full_like(moved[1], -2e-2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_alone_is_the_same_as_beside_others(backend, device):
    """Bit for bit, and the same twice; a matrix without a gradient keeps its state."""
    ops.use_kernels(backend)
    shapes = SHAPES["odd"]
    whole, again, each = (group_of(shapes, "rounded", device) for _ in range(3))
    for number in (1, 2):
        grads = drawn(shapes, number, device, torch.bfloat16)
        grads[1] = None
        for group in (whole, again):
            step_by(group, grads, number)
        for i, grad in enumerate(grads):
            if grad is not None:
                step_by(each, [grad if k == i else None for k in range(len(grads))], number)
    for group in (again, each):
        assert torch.equal(group.weights.param, whole.weights.param)
        assert all(map(torch.equal, group.moments, whole.moments))
    untouched, start = whole.state_of(1), group_of(shapes, "rounded", device).state_of(1)
    assert all(torch.equal(untouched[name], start[name]) for name in start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_a_step_that_is_not_applied(backend, device):
    ops.use_kernels(backend)
    group = group_of(SHAPES["eight"], "split", device)
    grads = [g.flatten() for g in drawn(SHAPES["eight"], 1, device, torch.bfloat16)]
    offsets = group.flat.offsets
    table = op.chunk_table(grads, offsets, backend, group.numbers(offsets)).to(device)
    control, step = torch.zeros(CONTROL_SIZE, device=device), torch.ones(1, dtype=torch.int32, device=device)
    shapes = [size for shape in group.shapes(offsets) for size in shape]
    before = [t.clone() for t in (*group.weights[:2], *group.moments)]
    rest = (grads, offsets, table, control, torch.zeros(4, device=device), step, shapes, 3, 0.9, 0.999, 1e-8, backend)
    args = (*group.weights[:2], list(group.moments), *rest)
    torch.library.opcheck(op._update, args, test_utils=("test_schema", "test_faketensor"))
    assert all(map(torch.equal, before, (*group.weights[:2], *group.moments)))
