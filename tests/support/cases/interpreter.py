"""Fixtures of tests that run kernels: device, launches, NaN in fresh memory, and an interpreter that rounds as a GPU.

A conftest.py imports them by name. Nothing here imports Triton early: `--ptx` chooses the interpreter before that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sgg_kernels import launch

from sgg_fast import ops


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled instead, on CUDA")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" (Triton's interpreter) or "cuda" (compiled)."""
    return request.param


@pytest.fixture(autouse=True)
def automatic_kernels() -> Iterator[None]:
    """A test that chooses its kernels leaves the automatic choice."""
    yield
    ops.use_kernels("auto")


@pytest.fixture
def launched(device: str) -> Iterator[list[str]]:
    """Names of the kernels that ran."""
    names: list[str] = []

    def note(kernel, grid, args, options) -> bool:
        names.append(kernel.__name__)
        return False

    with launch.intercept(note):
        yield names


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin give NaN, an absurd integer or True, so that an element left unwritten shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def bf16_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts fp32 -> bf16 off where the hardware rounds to nearest even: do as the hardware does."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bf16 matrices in the interpreter."""
    widen_products(monkeypatch)


@pytest.fixture(autouse=True)
def floats_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python float that a kernel receives is fp32 once compiled; the interpreter would compute on it in float64."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    convert = interpreter._implicit_cvt

    def narrowed(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", narrowed)


def widen_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of bf16 are multiplied as numbers."""
    from benchmarks.harness.verify import widened  # late: it imports the kernels, before which --ptx must choose

    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot", widened(builder.create_dot))
