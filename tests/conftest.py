"""Shared by every test: Triton's interpreter where there is no GPU, and what is skipped, with its reason."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {"slow": pytest.mark.skip(reason="slow: over a minute or the true model size; run with --slow")}
    if config.getoption("--slow"):
        del skips["slow"]
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="gpu: no CUDA device here")
    for item in items:
        for name, skip in skips.items():
            if name in item.keywords:
                item.add_marker(skip)
