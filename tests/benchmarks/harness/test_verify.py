"""The judge of results: what agrees with the reference, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cases.benchmark import FLOAT_OPS, small_case

from benchmarks.harness import verify
from benchmarks.ops import baselines, registry


def test_few_columns_stand_for_all(monkeypatch):
    monkeypatch.setattr(verify, "MANY_ELEMENTS", 0)
    monkeypatch.setattr(verify, "FEW_COLUMNS", 4)
    for op in FLOAT_OPS:
        case = small_case(op)
        given = registry.inputs(case, "cpu")
        judge, form = verify.Judge(case, given), baselines.form(op, "eager")
        assert (judge.columns is None) == (op in verify.MIXES_COLUMNS)
        results = verify.run(form, given, given.tensors, case.mode)
        assert not judge.verdict(results, "eager").reason
        results[0][0, 0 if judge.columns is None else judge.columns[0]] += 1
        assert judge.verdict(results, "eager").reason


def test_a_wrong_integer_is_refused():
    case = small_case("pack")
    given = registry.inputs(case, "cpu")
    judge, form = verify.Judge(case, given), baselines.form("pack", "reference")
    results = verify.run(form, given, given.tensors, "fwd")
    assert not judge.verdict(results, "reference").reason
    results[2][0] += 1
    assert judge.verdict(results, "reference").reason == "tensors [2] differ"


def test_the_interpreter_multiplies_bf16_as_numbers(monkeypatch):
    """It holds them as the upper half of an fp32's bits."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    def handle(tensor: torch.Tensor) -> object:
        bits = tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    builder, stock = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(builder, "create_dot", stock)  # put back at the end
    a, b = torch.tensor([[1.0, -2.5], [0.125, 3.0]]), torch.tensor([[4.0, 1.0], [-1.0, 0.5]])
    zero = interpreter.TensorHandle(np.zeros((2, 2), np.float32), tl.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    verify.widen_products()
    assert builder.create_dot is stock
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verify.widen_products()
    found = builder.create_dot(interpreter.interpreter_builder, handle(a), handle(b), zero, None, 0)
    assert found.data.tolist() == (a @ b).tolist()
