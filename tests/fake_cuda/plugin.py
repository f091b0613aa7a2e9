"""GPU tests on the stand-in, numbers ignored: `python -m pytest -p fake_cuda.plugin -m gpu`.

Helpers that compare numbers return; everything else, a bare assertion included, raises as ever. Tests that assert
numbers in bare assertions are named in `ABOUT_NUMBERS`: an AssertionError may end them, and no other error. After each
test there must be no call that a device would have refused, unless the test is about one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from . import device, run

ABOUT_NUMBERS = {
    "test_a_skipped_step_is_told_slots_steps_later": "a picture's NaN",
    "test_a_weight_that_is_no_number_is_not_rounded_to_one": "the place of a NaN",
    "test_arithmetic_on_an_argument_is_fp32": "a product",
    "test_clips_by_the_norm_over_all_groups_and_each_has_its_rate": "the norm of the gradients",
    "test_every_code_is_found_between_the_right_neighbours": "codes",
    "test_geglu_is_exact_and_not_the_tanh_form": "the distance of two forms",
    "test_is_torchs_adam_over_many_steps": "the number of steps",
    "test_mask_against_loops": "which objects are masked",
    "test_nan_comes_through": "a NaN",
    "test_padding_and_parameters_without_gradient_stay": "zeros of the padding",
    "test_padding_is_one_more_graph": "marks of the padding",
    "test_padding_stays_zero": "zeros of the padding",
    "test_rounding_is_right_on_average": "a mean",
    "test_statistics_at_a_large_mean": "a mean",
    "test_the_corrections_keep_their_digits": "powers of the decay rates",
    "test_training_follows_the_reference": "losses that fall",
}
"""Name of a test -> the number that it asserts."""


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

    for found in pkgutil.walk_packages(support.__path__, "support."):
        try:
            _ignore_numbers(importlib.import_module(found.name))
        except ModuleNotFoundError:  # what it drives (a browser) is not installed, so no test here uses it
            continue


def _ignore_numbers(module: ModuleType) -> None:
    """The module's helpers that compare return."""
    for name in [name for name in vars(module) if name.startswith("assert_")]:
        setattr(module, name, _nothing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Helpers of test modules return, too; a bare assertion of a test about numbers may fail, nothing else."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        _ignore_numbers(module)
    for item in items:
        name = item.originalname if isinstance(item, pytest.Function) else item.name
        if name in ABOUT_NUMBERS:
            reason = f"kernels compute nothing here: {ABOUT_NUMBERS[name]}"
            item.add_marker(pytest.mark.xfail(raises=AssertionError, strict=False, reason=reason))


@pytest.fixture(autouse=True)
def no_refused_call(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that causes refused calls on purpose asks for `refusals`."""
    device.forget_complaints()
    yield
    if "refusals" not in request.fixturenames:
        refused = device.complaints()
        if refused:  # no AssertionError, which a test about numbers may raise
            pytest.fail("\n".join(refused))


@pytest.fixture
def refusals() -> None:
    """For a test that is about calls that a device refuses."""
