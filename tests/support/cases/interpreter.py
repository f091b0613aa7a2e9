"""What Triton's interpreter does otherwise than a compiler, set right for a test."""

from __future__ import annotations

import pytest


def widen_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of bf16 are multiplied as numbers."""
    from benchmarks.harness.verify import widened  # late: it imports the kernels, before which --ptx must choose

    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot", widened(builder.create_dot))
