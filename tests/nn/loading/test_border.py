"""The border: whatever a library raises is one line, but signals and exits pass."""

from __future__ import annotations

import pytest

from sgg_fast.nn.loading import ModelError, border


class PanicException(BaseException):
    """As pyo3 calls what Rust raises."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\nsecond"), "first"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
        (RecursionError("maximum depth"), "maximum depth"),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (PanicException("called `unwrap()`"), "PanicException: called `unwrap()`"),
        (ValueError("\x1b[31mred \u202e"), r"\x1b[31mred \u202e"),
        (AssertionError("a" * 1000), f"AssertionError: {'a' * 284}..."),
    ],
)
def test_anything_becomes_one_line(error, said):
    with pytest.raises(ModelError) as caught, border("--model x"), border("unet/config.json"):
        raise error
    assert str(caught.value) == f"--model x: unet/config.json: {said}" and caught.value.__cause__.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_signals_and_exits_pass(error):
    with pytest.raises(type(error)), border("x"):
        raise error
