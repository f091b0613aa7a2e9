"""Compares a form's result with the reference before it is timed; a form that fails gets no number.

The reference is `sgg_kernels.reference` in float64 (the layer's: the published formulation in float64), with outputs
and all gradients. Tolerance by rule: a form's error may be twice the error of the plain form in the same dtype, plus a
floor. For our forms the plain form is the reference (sums in fp32), for baselines it is eager torch, which sums in the
input's dtype.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops import baselines as baselines_torch
from benchmarks.ops.baselines import OpForm, Tensors
from benchmarks.ops.cases import Case
from benchmarks.ops.registry import DTYPES, Inputs, upstream

FLOOR = 1e-6
"""Relative; eight units in the last place of fp32."""

FEW_COLUMNS = 32
MANY_ELEMENTS = 2**26
"""Number of input elements above which only FEW_COLUMNS columns are compared; the check for NaN covers all."""

MIXES_COLUMNS = ("layer", "group_norm_silu", "group_norm_silu_shift", "add_layer_norm", "cross_attention", "hash_draw")
"""Ops whose columns cannot be compared separately."""

FLIPPED_UNITS, MANY_UNITS = 4, 10**5
"""Relu units of the layer that may flip if there are many, because their input is so near 0 that rounding decides. Each
flip moves a gradient's norm by about the root of its share."""


def _cut_off(backend: str, dtype: str) -> float:
    """Extra tolerance of Triton's interpreter: it truncates fp32 when it stores bf16, where hardware rounds."""
    interpreted = backend == "ours" and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.finfo(torch.bfloat16).eps if interpreted and dtype == "bf16" else 0.0


def widened(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's product of matrices, with bf16 widened first: it would multiply the bits as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def product(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b))
        return create_dot(builder, a, b, *rest)

    return product


def widen_products() -> None:
    """`widened` for the rest of this process, if Triton's interpreter runs the kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import InterpreterBuilder

        InterpreterBuilder.create_dot = widened(InterpreterBuilder.create_dot)


def _arriving(number: int, output: torch.Tensor) -> torch.Tensor:
    return upstream(output.shape, output.dtype, output.device, number)


def run(
    form: OpForm, inputs: Inputs, tensors: Tensors, mode: str,
    arriving: Callable[[int, torch.Tensor], torch.Tensor] = _arriving,
) -> list[torch.Tensor]:  # fmt: skip
    """Outputs of `form`, followed by the gradients of every tensor unless `mode` is "fwd".

    arriving: the incoming gradient of an output, by its number.
    """
    if mode == "fwd":
        with torch.no_grad():
            return list(form(inputs, tensors))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = form(inputs, leaves)
    gradients = [arriving(i, output) for i, output in enumerate(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(leaves.values()), gradients)]


def _columns(tensor: torch.Tensor, width: int, columns: torch.Tensor) -> torch.Tensor:
    """The columns k, width + k, 2 width + k .. of the last dimension for each k in `columns`."""
    return tensor.unflatten(-1, (-1, width))[..., columns].flatten(-2)


def _true_form(op: str) -> OpForm:
    return baselines_torch.FORMS[op, "sg2im" if op == "layer" else "reference"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of comparing a form with the reference."""

    reason: str
    """Empty if it passed."""
    error: float
    """Largest relative L2 error of its tensors."""


class Judge:
    """The reference of one case, computed once, and the tolerances."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self.exact = case.op == "pack"
        if self.exact:
            self.truth = run(_true_form("pack"), inputs, inputs.tensors, "fwd")
            return
        self.columns = self._choose_columns()
        if case.op == "hash_draw":
            self.truth = [baselines_torch.exact_draw(inputs)]
            plain = self._errors(run(baselines_torch.FORMS["hash_draw", "eager"], inputs, inputs.tensors, "fwd"))
            self.allowed = {"reference": plain, "eager": plain}
            return
        self.truth = self._plain(_true_form(case.op), torch.float64)
        dtype = DTYPES[case.dtype]
        self.allowed = {
            name: self._errors(self._plain(baselines_torch.form(case.op, name), dtype))
            for name in ("reference", "eager")
        }

    def _choose_columns(self) -> torch.Tensor | None:
        if self.case.op in MIXES_COLUMNS or sum(t.numel() for t in self.inputs.tensors.values()) <= MANY_ELEMENTS:
            return None
        width = self.inputs.shape.width
        step = -(-width // FEW_COLUMNS)
        device = self.inputs.batch.subject.device
        return (torch.arange(0, width, step, device=device) + torch.randint(step, (1,)).item()).clamp(max=width - 1)

    def _select(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.columns is None else _columns(tensor, self.inputs.shape.width, self.columns)

    def _plain(self, form: OpForm, dtype: torch.dtype) -> list[torch.Tensor]:
        """`form` on the compared columns in `dtype`, with the gradients that the whole input would give."""
        given = next(iter(self.inputs.tensors.values())).dtype
        tensors = {name: self._select(t).to(dtype) for name, t in self.inputs.tensors.items()}
        width = self.inputs.shape.width if self.columns is None else len(self.columns)

        def arriving(number: int, output: torch.Tensor) -> torch.Tensor:
            shape = (*output.shape[:-1], output.shape[-1] // width * self.inputs.shape.width)
            return self._select(upstream(shape, given, output.device, number)).to(dtype)

        return run(form, self.inputs, tensors, self.case.mode, arriving)

    def _errors(self, results: list[torch.Tensor]) -> list[tuple[float, float]]:
        """(largest absolute, relative L2) error of each tensor, both over the compared columns."""
        errors = []
        for result, truth in zip(results, self.truth, strict=True):
            off = result.double() - truth
            scale = torch.linalg.vector_norm(truth).clamp(min=1e-30)
            errors.append((off.abs().max().item(), (torch.linalg.vector_norm(off) / scale).item()))
        return errors

    def verdict(self, results: list[torch.Tensor], backend: str) -> Verdict:
        """Compare a result of `run` for `backend`."""
        if len(results) != len(self.truth):
            return Verdict(f"{len(results)} tensors instead of {len(self.truth)}", float("nan"))
        if self.exact:
            wrong = [i for i, (r, t) in enumerate(zip(results, self.truth, strict=True)) if not torch.equal(r, t)]
            return Verdict(f"tensors {wrong} differ" if wrong else "", float(bool(wrong)))
        for i, result in enumerate(results):
            if result.numel() and not torch.isfinite(torch.stack(torch.aminmax(result))).all():
                return Verdict(f"tensor {i} is not finite", float("nan"))
        results = [self._select(r) for r in results]
        for i, (result, truth) in enumerate(zip(results, self.truth, strict=True)):
            if result.shape != truth.shape:
                return Verdict(f"tensor {i}: shape {tuple(result.shape)}, not {tuple(truth.shape)}", float("nan"))
        errors = self._errors(results)
        allowed = self.allowed["reference" if backend in ("ours", "reference") else "eager"]
        worst = max(l2 for _, l2 in errors)
        is_layer, shape = self.case.op == "layer", self.inputs.shape
        cut_off = _cut_off(backend, self.case.dtype)
        num_units = (4 * shape.relations + 2 * shape.objects) * shape.width if is_layer else 0
        floor = FLOOR + cut_off + (FLIPPED_UNITS / num_units**0.5 if num_units > MANY_UNITS else 0.0)
        for i, ((absolute, l2), (base_absolute, base_l2), truth) in enumerate(
            zip(errors, allowed, self.truth, strict=True)
        ):
            if l2 > 2 * base_l2 + floor:
                return Verdict(f"tensor {i}: relative error {l2:.2e}, plain form {base_l2:.2e}", worst)
            limit = 2 * base_absolute + (FLOOR + cut_off) * max(truth.abs().max().item(), 1.0)
            if not is_layer and absolute > limit:
                return Verdict(f"tensor {i}: off by {absolute:.2e}, plain form {base_absolute:.2e}", worst)
        return Verdict("", worst)
