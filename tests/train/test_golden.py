"""A few tiny steps of both stages train as they did when `golden.json` was written, before the house was redesigned.

The numbers are of one CPU, so they are held to a tolerance that another CPU's rounding stays within. With
SGG_GOLDEN_BITS=1 the bits of the results are compared as well, on the machine and with the torch that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import DS_JSON
from support.tiny_runs import rows, train

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())

RUNS = {"pretrain": None, "finetune": None, "finetune ds.json": DS_JSON}


def digest(result: Path) -> str:
    """SHA-256 of every tensor of a result, by file and name."""
    found = hashlib.sha256()
    for path in sorted(result.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            found.update(name.encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("golden"), "pretrain")


@pytest.mark.parametrize("name", list(RUNS))
def test_losses_are_what_they_were(pretrained, tmp_path, name):
    ds, golden = RUNS[name], GOLDEN[name]
    result = pretrained
    if name != "pretrain":  # with the optimiser that was the toy's then
        result = train(tmp_path, "finetune", ds, graph_encoder=pretrained, optimizer="adam8bit")
    found = list(rows(result.parent).values())
    assert len(found) == len(golden["losses"]) == 4
    for step, expected in zip(found, golden["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
    if os.environ.get("SGG_GOLDEN_BITS"):
        assert digest(result) == golden["sha256"]
