"""GPU tests on the stand-in, numbers ignored: `python -m pytest -p fake_cuda.plugin -m gpu`.

Helpers that compare numbers return; everything else, a bare assertion included, raises as ever. A test whose course
depends on numbers (`ABOUT_NUMBERS`) is skipped. After each test there must be no call that a device would have refused,
unless the test is about one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from . import device, run

ABOUT_NUMBERS = {
    "test_a_skipped_step_is_told_slots_steps_later": "a picture's NaN decides whether the device skips the step",
}
"""Name of a test -> why it cannot run where kernels compute nothing."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a helper that asserts."""


def _yes(*args: Any, **kwargs: Any) -> bool:
    """In place of one that answers."""
    return True


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported, so that names taken from these modules are the patched ones."""
    run.prepare()
    torch.testing.assert_close = _nothing
    np.testing.assert_allclose = np.testing.assert_array_equal = _nothing
    torch.equal = torch.allclose = _yes
    import support

    for found in pkgutil.iter_modules(support.__path__):
        try:
            module = importlib.import_module(f"support.{found.name}")
        except ModuleNotFoundError:  # what it drives (a browser) is not installed, so no test here uses it
            continue
        for name in [name for name in vars(module) if name.startswith("assert_")]:
            setattr(module, name, _nothing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what the stand-in cannot say anything about."""
    for item in items:
        name = item.originalname if isinstance(item, pytest.Function) else item.name
        if name in ABOUT_NUMBERS:
            item.add_marker(pytest.mark.skip(reason=f"needs numbers: {ABOUT_NUMBERS[name]}"))


@pytest.fixture(autouse=True)
def no_refused_call(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that causes refused calls on purpose asks for `refusals`."""
    device.forget_complaints()
    yield
    if "refusals" not in request.fixturenames:
        assert device.complaints() == []


@pytest.fixture
def refusals() -> None:
    """For a test that is about calls that a device refuses."""
