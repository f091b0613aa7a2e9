"""Both dispatches of an operator give the same; undefined gradients cost nothing; what has no derivative says so."""

from __future__ import annotations

import pytest
import torch
from support.cases.function import Blocked
from support.cases.graph import BATCHES, OPS, call, inputs_of
from torch._subclasses.fake_tensor import FakeTensorMode

from sgg_fast import ops
from sgg_fast.ops import unet_kernels


@pytest.fixture(autouse=True)
def kernels():
    ops.use_kernels("triton")
    yield
    ops.use_kernels("auto")


def norm() -> tuple[torch.Tensor, ...]:
    """Leaves x [2, 8, 3], weight [8], bias [8]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 3), (8,), (8,))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


class Passive(torch.utils._python_dispatch.TorchDispatchMode):
    """Only makes every call a traced one, and lists the operators of ours that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sgg_fast":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_both_dispatches_give_the_same_bits(op):
    batch = BATCHES["unsorted"]()
    found = []
    for mode in (None, Passive()):
        inputs = {k: x.requires_grad_() for k, x in inputs_of(op, batch, 5, torch.float32).items()}
        with mode or torch.enable_grad():
            outputs = call(op, inputs, batch)
            grads = torch.autograd.grad(sum((out * out).sum() for out in outputs), list(inputs.values()))
        found.append([*outputs, *grads])
    assert mode.names == [f"sgg_fast::{op.removesuffix('_residual')}{end}" for end in ("", "_bwd")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_fake_tensors_reach_no_kernel():
    with FakeTensorMode():
        x, weight, bias = torch.empty(2, 3, 8), torch.empty(8), torch.empty(8)
        assert unet_kernels.group_norm_silu(x, None, weight, bias, 2, 1e-5, True)[0].shape == (2, 3, 8)
    assert unet_kernels.geglu(FakeTensorMode().from_tensor(torch.zeros(3, 8))).shape == (3, 4)  # a subclass, no mode


@pytest.mark.parametrize("op", [*OPS, "group_norm_silu", "geglu", "group_norm_silu_beside", "add_layer_norm"])
@pytest.mark.parametrize("traced", [False, True])
def test_undefined_gradients(op, traced):
    """Every subset of an operator's outputs may lack a gradient; an input gets what the others give."""
    batch = BATCHES["unsorted"]()
    if op in OPS:
        inputs = {k: x.requires_grad_() for k, x in inputs_of(op, batch, 5, torch.float32).items()}
    else:
        inputs = dict(zip(("x", "weight", "bias"), norm(), strict=True))

    def run() -> tuple[torch.Tensor, ...]:
        if op in OPS:
            return call(op, inputs, batch)
        if op == "add_layer_norm":
            return ops.add_layer_norm(leaves[0].mT, *leaves[1:], 1e-5, leaves[0].mT)
        if op == "group_norm_silu_beside":
            return ops.group_norm_silu_beside(*leaves, 4, 1e-5)
        return (ops.geglu(inputs["x"].mT) if op == "geglu" else ops.group_norm_silu(*leaves, 4, 1e-5),)

    leaves = list(inputs.values())
    if op == "geglu":
        del leaves[1:]
    with Passive() if traced else torch.enable_grad():
        for kept in range(len(run()) + 1):  # all outputs blocked but number `kept`; the last round blocks all
            outputs = [out if k == kept else Blocked.apply(out) for k, out in enumerate(run())]
            found = torch.autograd.grad(sum(out.sum() for out in outputs), leaves, allow_unused=True)
            if kept == len(outputs):
                assert found == (None,) * len(leaves)
                continue
            expected = torch.autograd.grad(
                sum(out.sum() * (k == kept) for k, out in enumerate(run())), leaves, allow_unused=True
            )
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(torch.zeros_like(b) if a is None else a, b)


def test_forward_mode_raises():
    x, weight, bias = norm()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match="forward"),
    ):
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        ops.group_norm_silu(dual, weight, bias, 4, 1e-5)


def test_functional_transforms_raise():
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.geglu(x).sum())(torch.ones(3, 8))


def test_second_derivatives_raise():
    x = torch.ones(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="sgg_fast::geglu has no second derivative"):
        torch.autograd.grad(ops.geglu(x).sum(), x, create_graph=True)
