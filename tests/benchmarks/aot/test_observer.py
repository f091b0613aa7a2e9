"""`benchmarks.aot.observer`: the bytes, instructions and chained loads of a launch of which some programs run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.aot.programs import DOUBLED, compiled, entry

from benchmarks.aot.observer import Observer, chained_loads, moved
from benchmarks.aot.ptx.counts import SECTOR
from benchmarks.aot.ptx.program import Program
from benchmarks.counts.model import Launch


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


@pytest.mark.parametrize(
    ("body", "chain"),
    [
        ("ld.global.b32 %r5, [%rd1]; ld.global.b32 %r6, [%rd2];", 1),
        ("ld.global.b64 %rd5, [%rd1]; add.s64 %rd6, %rd5, 4; ld.global.b32 %r6, [%rd6];", 2),
        ("ld.global.b64 %rd5, [%rd1]; mov.b64 %rd5, 4; ld.global.b32 %r6, [%rd5];", 1),
        ("ld.global.b64 %rd5, [%rd1]; @%p1 mov.b64 %rd5, 4; ld.global.b32 %r6, [%rd5];", 2),
        ("ld.shared.b32 %r5, [%r1]; ld.shared.b32 %r6, [%r5];", 0),
        ("cp.async.wait_group 0; cp.async.wait_group 3;", 1.25),
    ],
    ids=["side by side", "one after the other", "over a constant", "over a guard", "shared", "copies"],
)
def test_loads_that_wait_for_each_other(body, chain):
    (block,) = Program(entry(body, 0)).blocks
    assert chained_loads(block) == chain


def test_a_launch_is_noted_as_a_warp_of_it_ran():
    """Two of ten programs, each of which reads a tenth of the rows and writes another."""
    observer = Observer("sm_89", 2)
    kernel, made = compiled(entry(DOUBLED, 4), {"x_ptr": "*i32", "out_ptr": "*i32"})
    x, out = (aligned(20).view(torch.int32).flatten() for _ in range(2))
    x.fill_(1)
    observer.run(kernel, made, (10,), (x, out), {})
    observer.run(kernel, made, (1,), (x, out), {})
    (block,) = Program(entry(DOUBLED, 4)).blocks
    sampled, one = observer.taken()
    assert sampled == Launch("hand_kernel", 10, 1, float(len(block)), 1.0, 2 * 320 * 4)
    assert one == Launch("hand_kernel", 1, 1, float(len(block)), 1.0, 2 * 32 * 4)
    assert observer.taken() == []
    assert out.view(10, 32)[:, 0].tolist() == [2, *[0] * 8, 2], "eight programs did not run"
