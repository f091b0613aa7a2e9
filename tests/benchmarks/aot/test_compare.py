"""`benchmarks.aot.compare`: the rule of the tolerance, by hand and on operators right and wrong."""

from __future__ import annotations

import pytest
import torch
from support.cases.interpreter import (  # noqa: F401 - pytest finds them here
    automatic_kernels,
    bf16_rounds_to_nearest,
    floats_are_fp32,
)

from benchmarks.aot.compare import FLOOR, _evaluate, check, compare, compare_norms
from benchmarks.ops import registry
from sgg_fast import ops


def test_an_error_may_be_twice_the_references():
    """Plus the floor, relative to the largest result plus 1; the type and the shape are the reference's."""
    exact = {"y": torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64)}
    low = {"y": exact["y"].float() + torch.tensor([0.01, 0.0, 0.0])}
    for error in (0.0, 0.0199, -0.0199):
        compare({"y": exact["y"].float() + torch.tensor([0.0, 0.0, error])}, low, exact)
    with pytest.raises(AssertionError, match=r"y: off by 0.0201, the reference in its precision by 0.01"):
        compare({"y": exact["y"].float() + torch.tensor([0.0, 0.0, 0.0201])}, low, exact)
    compare({"y": exact["y"] + 3.9 * FLOOR}, exact, exact)
    for wrong in (exact["y"] + 4.1 * FLOOR, exact["y"].float(), exact["y"][:2], exact["y"] * torch.nan):
        with pytest.raises(AssertionError):
            compare({"y": wrong}, exact, exact)
    with pytest.raises(AssertionError):
        compare({}, low, exact)
    compare(*[{"none": torch.zeros(0)}] * 3)


def test_norms_forgive_one_larger_error_but_no_outlier():
    exact = {"y": torch.zeros(100, dtype=torch.float64)}
    low = {"y": torch.full((100,), 0.01)}
    found = {"y": torch.full((100,), 0.01)}
    found["y"][3] = 0.039
    compare_norms(found, low, exact)
    with pytest.raises(AssertionError):
        compare(found, low, exact)
    found["y"][3] = 0.041
    with pytest.raises(AssertionError, match=r"off by 0\.041"):
        compare_norms(found, low, exact)
    with pytest.raises(AssertionError, match=r"off by 0\.21"):
        compare_norms({"y": torch.full((100,), 0.021)}, low, exact)


def test_outputs_and_the_gradient_of_every_input_are_compared():
    """Incoming gradients have the outputs' types, or the types that are asked for, and are the same for all."""
    inputs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, -1.0])}

    def run(a, b):
        return a * b, a + b

    found = _evaluate("reference", run, inputs)
    assert list(found) == ["output 0", "output 1", "gradient of a", "gradient of b"]
    assert found["output 0"].tolist() == [3, -2] and found["output 1"].tolist() == [4, 1]
    g, h = (registry.upstream((2,), torch.float32, torch.device("cpu"), i) for i in (0, 1))
    assert torch.equal(found["gradient of a"], g * inputs["b"] + h)
    assert torch.equal(found["gradient of b"], g * inputs["a"] + h)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = _evaluate("reference", run, wide, [torch.float32] * 2)
    assert torch.equal(exact["gradient of a"], g.double() * wide["b"] + h.double())


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled instead, on CUDA")
def test_an_operator_is_checked_forward_and_backward():
    """The gate passes in Triton's interpreter; an output or a gradient that is off by a thousandth does not."""
    x = {"x": torch.randn(5, 32, generator=torch.Generator().manual_seed(0))}
    check(lambda x: (ops.geglu(x),), x)
    for forward, backward in ((1.001, 1.0), (1.0, 1.001)):
        factors = iter([(forward, backward), (1.0, 1.0), (1.0, 1.0)])  # of the kernels, and of the references

        def run(x, factors=factors):
            value, slope = next(factors)
            y = ops.geglu(x)
            return (slope * y + (value - slope) * y.detach(),)

        with pytest.raises(AssertionError, match="output 0" if forward > 1 else "gradient of x"):
            check(run, x)
    judged = []
    check(lambda x: (ops.geglu(x),), x, lambda *given: judged.append(given))
    ((found, low, exact),) = judged
    assert [y["output 0"].dtype for y in (found, low, exact)] == [torch.float32, torch.float32, torch.float64]
