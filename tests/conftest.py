"""Shared by every test: Triton's interpreter where there is no GPU, and what is skipped, with its reason."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Before torch: two threads that spin on two shared cores made a run 200 times slower. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from support import ptx_plugin

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

# The first backward counts devices. After a fake CUDA tensor a CUDA build counts 255 and starts their threads; then no
# fork can go backward any more.
torch.ones(1, requires_grad=True).sum().backward()

sys.path.append(str(Path(__file__).resolve().parents[1]))  # train.py and infer.py; last, for kernels/ is there too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--browser", action="store_true", help="also run the tests marked browser; they need Chromium")
    ptx_plugin.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--browser") and importlib.util.find_spec("playwright") is None:
        raise pytest.UsageError("--browser needs playwright: pip install -e '.[browser]'")
    if config.getoption("--ptx"):
        config.pluginmanager.register(ptx_plugin.PtxPlugin(config.getoption("--ptx-arch")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {"slow": pytest.mark.skip(reason="slow: over a minute or the true model size; run with --slow")}
    skips["browser"] = pytest.mark.skip(reason="browser: drives a real Chromium; run with --browser")
    for option in ("slow", "browser"):
        if config.getoption(f"--{option}"):
            del skips[option]
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="gpu: no CUDA device here")
    for item in items:
        for name, skip in skips.items():
            if name in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with both stages of the toy recipe, a few steps each; made once, also under pytest -n. Read only."""
    from support.tiny_runs import train

    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    run = base / "trained_run"
    with FileLock(base / "trained_run.lock"):
        if not (run / "finetune" / "pipeline").is_dir():
            train(run, "pretrain")
            train(run, "finetune", sample_every=2)
    return run
