"""What Triton's interpreter does otherwise than a compiler, set right for a test."""

from __future__ import annotations

import numpy as np
import pytest


def widen_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of bf16 are multiplied as numbers; the interpreter multiplies their bits as integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widened(self, a, b, *rest):
        if a.dtype == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b)
            )
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", widened)
