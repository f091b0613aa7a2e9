"""Functions of tensors under both forms of the kernels: outputs, gradients, and the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgg_fast import ops
from support.cases.graph import Tensors, assert_within_rule, randn


def evaluate(backend: str, run: Callable[..., Any], inputs: Tensors) -> Tensors:
    """Every output and the gradient of every input under fixed random cotangents, by name. A single output is "out"."""
    ops.use_kernels(backend)
    try:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        outputs = run(**leaves)
        names = ["out"] if isinstance(outputs, torch.Tensor) else [f"output {i}" for i in range(len(outputs))]
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        arriving = [randn(100 + i, *o.shape).to(o) for i, o in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), arriving)
    finally:
        ops.use_kernels("auto")
    found = {name: o.detach() for name, o in zip(names, outputs, strict=True)}
    return found | {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}


def compare(run: Callable[..., Any], inputs: Tensors, device: str) -> Tensors:
    """The Triton form against the reference, by the tolerance rule; returns what Triton gave."""
    inputs = {name: x.to(device) for name, x in inputs.items()}
    found = evaluate("triton", run, inputs)
    exact = evaluate("reference", run, {name: x.double() for name, x in inputs.items()})
    assert_within_rule(found, evaluate("reference", run, inputs), exact)
    return found


class Blocked(torch.autograd.Function):
    """Identity without a gradient: the operator before it gets None."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None
