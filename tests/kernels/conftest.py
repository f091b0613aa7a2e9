"""Fixtures of the kernel tests, and the operators that the checks of every graph kernel run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock
from support.cases.interpreter import (  # noqa: F401 - pytest finds them here
    automatic_kernels,
    bf16_products,
    bf16_rounds_to_nearest,
    device,
    floats_are_fp32,
    launched,
    poisoned,
)

pytest.register_assert_rewrite("support.kernels.graph_checks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`op`: each operator of the test file's CHECKED. `plain_op`: without the variant that takes the same path."""
    chosen = getattr(metafunc.module, "CHECKED", ())
    for argument, names in (("op", chosen), ("plain_op", [op for op in chosen if op != "scatter_mean_residual"])):
        if chosen and argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)


@pytest.fixture
def card(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Under pytest -n one test at a time holds 9 to 18 GB, and gives them back: five at once do not fit 24 GB."""
    base = tmp_path_factory.getbasetemp()
    with FileLock((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "card.lock"):
        yield
        if device == "cuda":
            torch.cuda.empty_cache()
