"""What the model of a launch is told: bytes, each sector once, and what counts as a difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.aot.observe import differences, observe
from benchmarks.aot.observer import moved
from benchmarks.aot.ptx.counts import SECTOR
from benchmarks.aot.rules import in_fresh_process


def sectors(tensor: torch.Tensor, *rows: int) -> np.ndarray:
    """The sectors of some rows of an aligned tensor."""
    row = tensor.stride(0) * tensor.element_size() // SECTOR
    first = tensor.data_ptr() // SECTOR
    return np.concatenate([np.arange(first + r * row, first + (r + 1) * row) for r in rows]).astype(np.uint64)


def aligned(num_rows: int) -> torch.Tensor:
    """[num_rows, 16] fp32, two sectors a row."""
    whole = torch.zeros(num_rows * 16 + 8)
    skip = -whole.data_ptr() % SECTOR // 4
    return whole[skip : skip + num_rows * 16].view(num_rows, 16)


def test_a_sector_counts_once_and_a_tensor_for_its_bytes_at_most():
    x, y = aligned(100), aligned(4)
    touched = [sectors(x, 0, 1), sectors(x, 1, 2), sectors(y, 0, 1, 2, 3)]
    assert moved(touched, (x, y, 3, x), 1.0) == (3 + 4) * 64
    of_y = y.untyped_storage().nbytes()
    assert moved(touched, (x, y), 10.0) == 10 * 3 * 64 + of_y
    assert moved(touched, (), 10.0) == 10 * (3 + 4) * 64, "a table of addresses may point to it"
    assert moved([], (x,), 1.0) == 0


@pytest.fixture(scope="module")
def pooled():
    return in_fresh_process(observe, ["masked_pool"])


def test_both_kernels_of_a_pool_move_its_compulsory_bytes_together(pooled):
    """The one for hubs gets all rows as an argument and reads those of hubs."""
    from benchmarks.counts.roofline import compulsory
    from benchmarks.ops import registry
    from benchmarks.ops.cases import Case

    forward = pooled["masked_pool 1e4 bf16"][0]
    shape = registry.inputs(Case("masked_pool", "fwd", "1e4", "bf16"), "meta").shape
    least = compulsory("masked_pool", "fwd", shape, 2).bytes
    assert len(forward) == 2 and sum(launch["bytes"] for launch in forward) == pytest.approx(least, rel=0.02)


def test_a_count_may_differ_by_a_tenth(pooled):
    other = {name: [[dict(x) for x in each] for each in passes] for name, passes in pooled.items()}
    launch = other["masked_pool 1e4 bf16"][0][0]
    launch["bytes"] = round(1.05 * launch["bytes"])
    assert differences(pooled, other) == []
    launch["bytes"] = round(1.2 * launch["bytes"])
    assert len(differences(pooled, other)) == 1
    launch["programs"] += 1
    del other["masked_pool paper bf16"]
    assert len(differences(pooled, other)) == 2
