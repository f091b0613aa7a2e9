"""Compares a kernel's results with its reference in the same precision and in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.ops import registry
from sgg_fast import ops

Tensors = dict[str, torch.Tensor]
FLOOR = 1e-6
"""Relative to the largest result plus 1."""


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def compare(found: Tensors, low: Tensors, exact: Tensors) -> None:
    """Error against float64 <= 2 x the error of the reference in the same precision, plus the floor."""
    _compare(found, low, exact, 2, _largest)


def compare_norms(found: Tensors, low: Tensors, exact: Tensors) -> None:
    """`compare` of the errors' norms, for results with several roundings: the largest error of either is luck.

    No single error is over 4 x the reference's largest.
    """
    _compare(found, low, exact, 2, lambda x: x.norm().item())
    _compare(found, low, exact, 4, _largest)


def _compare(
    found: Tensors, low: Tensors, exact: Tensors, factor: float, size: Callable[[torch.Tensor], float]
) -> None:
    assert found.keys() == low.keys() == exact.keys()
    for name, want in exact.items():
        assert (found[name].dtype, found[name].shape) == (low[name].dtype, low[name].shape), name
        if not want.numel():
            continue
        error, allowed = (size(x[name].double() - want) for x in (found, low))
        limit = factor * allowed + FLOOR * (1 + size(want))
        assert error <= limit, f"{name}: off by {error:.3g}, the reference in its precision by {allowed:.3g}"


def _evaluate(
    backend: str, run: Callable[..., tuple[torch.Tensor, ...]], inputs: Tensors, narrow: list[torch.dtype] | None = None
) -> Tensors:
    """Outputs and the gradient of every input. Incoming gradients have the types `narrow`, by default the outputs'."""
    ops.use_kernels(backend)
    try:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        outputs = run(**leaves)
        types = narrow or [o.dtype for o in outputs]
        pairs = zip(outputs, types, strict=True)
        arriving = [registry.upstream(o.shape, t, o.device, i).to(o) for i, (o, t) in enumerate(pairs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), arriving)
    finally:
        ops.use_kernels("auto")
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


def check(
    run: Callable[..., tuple[torch.Tensor, ...]],
    inputs: Tensors,
    judge: Callable[[Tensors, Tensors, Tensors], None] = compare,
) -> None:
    """Compare the kernels with the reference, forward and backward. Raises AssertionError."""
    found, low = (_evaluate(backend, run, inputs) for backend in ("triton", "reference"))
    narrow = [x.dtype for name, x in found.items() if name.startswith("output")]
    judge(found, low, _evaluate("reference", run, {k: x.double() for k, x in inputs.items()}, narrow))
