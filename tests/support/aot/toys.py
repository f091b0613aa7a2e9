"""Kernels that each break one rule of `benchmarks.aot`, and the program that compiles them: see `test_compile.py`.

python tests/support/aot/toys.py sm_89 OUT.json    # without TRITON_INTERPRET
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import torch
import triton
import triton.language as tl
from sgg_kernels.launch import launch

from benchmarks.aot import compile as aot_compile
from benchmarks.aot.cases import AotCase


@triton.jit
def copy_kernel(x_ptr, out_ptr, stride, num_rows, BLOCK: tl.constexpr, MODE: tl.constexpr):
    """A row copied, right, or wrong in the way that MODE names."""
    i_row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    if MODE == "narrow":
        offset = i_row * stride + o
    elif MODE == "widened too late":
        offset = (i_row * stride).to(tl.int64) + o
    elif MODE == "strided":
        offset = i_row.to(tl.int64) * stride + 3 * o
    else:
        offset = i_row.to(tl.int64) * stride + o
    value = tl.load(x_ptr + offset)
    if MODE == "double":
        value = (value.to(tl.float64) * 1.1).to(tl.float32)
    if MODE == "atomic":
        tl.atomic_add(out_ptr + offset, value)
    else:
        tl.store(out_ptr + offset, value)


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, stride, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Rows gathered through int32 indices, the offset computed in 64 bits or in 32."""
    i_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_D = tl.arange(0, BLOCK_D)
    row = tl.load(index_ptr + i_M)
    if WIDE:
        row = row.to(tl.int64)
    value = tl.load(x_ptr + row[:, None] * stride + o_D[None, :])
    tl.store(out_ptr + i_M.to(tl.int64)[:, None] * BLOCK_D + o_D[None, :], value)


@triton.jit
def loop_kernel(x_ptr, out_ptr, stride, num_rows, BLOCK: tl.constexpr, POINTER: tl.constexpr):
    """Every row, by a pointer that advances or by an int32 offset that does."""
    o = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    p_x = x_ptr + o
    offset = 0
    for _ in range(num_rows):
        if POINTER:
            total += tl.load(p_x)
            p_x += stride
        else:
            total += tl.load(x_ptr + offset + o)
            offset += stride
    tl.store(out_ptr + o, total)


@triton.jit
def scattered_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    """Single floats gathered: adjacent lanes lie anywhere."""
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + tl.load(index_ptr + o).to(tl.int64)))


@triton.jit
def spill_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A block that one warp's registers do not hold, all of it alive twice."""
    o = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + o)
    total = tl.sum(value, axis=0)
    tl.store(out_ptr + o, value / total)


def floats(num: int) -> torch.Tensor:
    return torch.empty(num, dtype=torch.float32, device="meta")


def rows(mode: str, num_rows: int = 10_000_000, stride: int = 512, shift: int = 0) -> None:
    """`copy_kernel` over rows of 512, the tensors `shift` elements off their alignment."""
    x, out = floats(2**33)[shift:], floats(2**33)[shift:]
    launch(copy_kernel, (num_rows,), x, out, stride, num_rows, BLOCK=512, MODE=mode, num_warps=4)


def gather(wide: bool) -> None:
    index = torch.empty(2**20, dtype=torch.int32, device="meta")
    launch(gather_kernel, (2**16,), floats(2**33), index, floats(2**29), 512,
           BLOCK_M=16, BLOCK_D=128, WIDE=wide, num_warps=4)  # fmt: skip


def loop(pointer: bool) -> None:
    launch(loop_kernel, (1,), floats(2**33), floats(512), 512, 10_000_000, BLOCK=512, POINTER=pointer, num_warps=4)


def scattered() -> None:
    index = torch.empty(128, dtype=torch.int32, device="meta")
    launch(scattered_kernel, (1,), floats(2**20), index, floats(128), BLOCK=128, num_warps=4)


def spill(num_warps: int) -> None:
    launch(spill_kernel, (10_000,), floats(16384), floats(16384), BLOCK=16384, num_warps=num_warps)


def fails() -> None:
    launch(copy_kernel, (1,), floats(8), floats(8), 8, 1, BLOCK=7, MODE="right", num_warps=4)


CASES = [
    AotCase("right", lambda: rows("right"), True),
    AotCase("narrow", lambda: rows("narrow"), True),
    AotCase("narrow but small", lambda: rows("narrow", num_rows=1000), True),
    AotCase("widened too late", lambda: rows("widened too late"), True),
    AotCase("strided", lambda: rows("strided"), False),
    AotCase("double", lambda: rows("double"), True),
    AotCase("atomic", lambda: rows("atomic"), True),
    AotCase("off alignment", lambda: rows("right", shift=1), True),
    AotCase("odd stride", lambda: rows("right", stride=513), True),
    AotCase("gather", lambda: gather(True), True),
    AotCase("gather in 32 bits", lambda: gather(False), True),
    AotCase("advancing pointer", lambda: loop(True), True),
    AotCase("advancing offset", lambda: loop(False), True),
    AotCase("scattered floats", scattered, False),
    AotCase("spill", lambda: spill(1), True),
    AotCase("few warps", lambda: spill(4), True),
    AotCase("fails", fails, True),
    AotCase("no launch", lambda: None, True),
]

LEAST_WARPS = {"copy_kernel": 16, "gather_kernel": 16, "loop_kernel": 16, "spill_kernel": 32}
"""`scattered_kernel` is left out."""


if __name__ == "__main__":
    arch, out = sys.argv[1], pathlib.Path(sys.argv[2])
    aot_compile.use_chip(arch)
    made = aot_compile.compile_cases(arch, CASES, LEAST_WARPS)
    made += aot_compile.compile_chip(arch, "pack padded masked")
    out.write_text(json.dumps([dataclasses.asdict(row) for row in made]))
