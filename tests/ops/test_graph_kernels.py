"""The graph operators: schema, fake shapes and tracing, and gradients of whatever inputs and outputs are used."""

from __future__ import annotations

import pytest
import torch
from support.cases.function import Blocked
from support.cases.graph import BATCHES, OPS, Tensors, call, inputs_of

from sgg_fast import ops
from sgg_fast.ops import graph_kernels
from sgg_fast.ops.operator import Operator

LIBRARY = {name: value.library for name, value in vars(graph_kernels).items() if isinstance(value, Operator)}


def test_every_operator_is_checked_below():
    names = {"gather_add_relu", "scatter_mean", "masked_pool", "graph_mean", "triple_context"}
    assert set(LIBRARY) == names | {f"{name}_bwd" for name in names}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    """Schema, fake shapes, autograd registration and tracing, of the operator and of its backward."""
    batch = BATCHES["unsorted"]().to(device)
    inputs = {k: x.to(device).requires_grad_() for k, x in inputs_of(op, batch, 6, torch.float32).items()}
    name = op.removesuffix("_residual")
    calls: list[tuple[str, tuple]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sgg_fast":
                calls.append((func._schema.name.removeprefix("sgg_fast::"), args))
            return func(*args, **(kwargs or {}))

    ops.use_kernels("triton")
    with Record():
        outputs = call(op, inputs, batch)
        torch.autograd.grad(sum(out.sum() for out in outputs), list(inputs.values()))
    ops.use_kernels("auto")
    assert [made for made, _ in calls] == [name, f"{name}_bwd"]
    for made, args in calls:
        if made == name:  # the recorded arguments are below autograd
            args = (*inputs.values(), *args[len(inputs) :])
        else:
            args = (x.detach() if isinstance(x, torch.Tensor) else x for x in args)
        torch.library.opcheck(LIBRARY[made], tuple(args))


def gradients(backend: str, op: str, inputs: Tensors, wanted: list[str], outputs: slice = slice(None)) -> Tensors:
    """Gradients of the `wanted` inputs alone, 0 where there is none, from some of the outputs."""
    batch = BATCHES["unsorted"]().to(next(iter(inputs.values())).device)
    ops.use_kernels(backend)
    leaves = {k: x.detach().requires_grad_(k in wanted) for k, x in inputs.items()}
    sum(out.float().square().sum() for out in call(op, leaves, batch)[outputs]).backward()
    assert all(leaves[k].grad is None for k in inputs if k not in wanted)
    return {k: torch.zeros_like(leaves[k]) if leaves[k].grad is None else leaves[k].grad for k in wanted}


@pytest.mark.parametrize("op", OPS)
def test_frozen_inputs(op, device, poisoned):
    """Each input alone takes a gradient."""
    inputs = {k: x.to(device) for k, x in inputs_of(op, BATCHES["unsorted"](), 7).items()}
    for name in inputs:
        found, want = (gradients(backend, op, inputs, [name]) for backend in ("triton", "reference"))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2)], ids=["mean", "relations"])
@pytest.mark.parametrize("op", ["scatter_mean", "scatter_mean_residual"])
def test_an_output_that_nobody_uses(op, used, device, poisoned):
    inputs = {k: x.to(device) for k, x in inputs_of(op, BATCHES["unsorted"](), 7).items()}
    found, want = (gradients(backend, op, inputs, list(inputs), used) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("op", OPS)
def test_every_input_in_a_dtype_of_its_own(op, shift, device, poisoned):
    """Gradients come in the dtype of their input, whatever the others are in."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    plain = inputs_of(op, BATCHES["unsorted"](), 7)
    inputs = {k: x.to(device, dtypes[(i + shift) % 3]) for i, (k, x) in enumerate(plain.items())}
    found, want = (gradients(backend, op, inputs, list(inputs)) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=4e-2, atol=6e-2)


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_handed_on_as_none(op, device):
    batch = BATCHES["scenes"]().to(device)
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs_of(op, batch, 3).items()}
    ops.use_kernels("triton")
    outputs = call(op, inputs, batch)
    torch.stack([Blocked.apply(out).sum() for out in outputs]).sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs.values())
