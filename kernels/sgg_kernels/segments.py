"""Shared by the graph kernels: block sizes, the two-stage sum of long runs, column sums.

A run is the list of rows that add up to one result: an object's messages in one role, or the rows of one graph.
Runs are cut at fixed multiples of `chunk`. A hub kernel sums every chunk that lies wholly inside one run to an fp32
partial. The row kernel then adds a run's head and tail rows and its partials, in ascending order. The grid depends on
shapes only, each row is read once, and a run of a million rows occupies as many programs as a million short runs.

Block sizes are functions of shapes: there is no tuning at run time, and equal shapes give equal bits on every machine.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import launch

SMALL_ELEMENTS = 2**18
"""A tensor of at most this many elements is cut in narrow blocks, to occupy every SM. (256 x 512 is half of it.)"""

UNSPLIT_ROWS = 1024
"""Inputs of at most this many rows are not split: a second launch costs more than the longest possible run."""

SHORT_RUN = 4
"""Rows that most runs of an object do not exceed."""

MAX_PARTIALS = 2048
"""Most programs that sum columns, about one wave: at most 2048 rows of fp32 partials for any E."""


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [rows, D] with adjacent elements in a row and any row stride. Copies only if needed (an expanded gradient)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def width_block(num_rows: int, width: int) -> int:
    """BLOCK_D: columns a program works on."""
    return max(1, min(triton.next_power_of_2(width), 128 if num_rows * width <= SMALL_ELEMENTS else 512))


def run_options(num_rows: int, width: int, itemsize: int, fp32_residual: bool = False) -> dict[str, int]:
    """Blocks of a kernel that sums runs: 16 bytes a lane, one row across all lanes, so lanes exchange nothing.

    Large inputs take few rows at a time: an object has two to four messages in a role, and fewer registers allow more
    warps. Widths without 16-byte loads take few rows too. An fp32 residual beside the messages takes more registers:
    half the rows avoid spills with many rows, and allow 16 warps where y is half as wide.
    """
    block_d = width_block(num_rows, width)
    deep = num_rows * width <= SMALL_ELEMENTS and width % 16 == 0  # Triton proves alignment from multiples of 16 alone
    rows = 16 if deep else 4
    if fp32_residual and (deep or itemsize < 4):
        rows //= 2
    # Without a bound ptxas aims at a higher occupancy and spills a few words.
    return {
        "BLOCK_M": rows,
        "BLOCK_D": block_d,
        "num_warps": max(1, block_d * itemsize // 512),
        "maxnreg": 255 if deep else 128 if width % 16 == 0 else 168,
    }


def head_rows(options: dict[str, int]) -> int:
    """HEAD: rows of a run's first, smaller block; 0 for none. A run of an object has two rows on average."""
    return SHORT_RUN if options["BLOCK_M"] > SHORT_RUN else 0


def tile_options(num_rows: int, width: int, itemsize: int) -> dict[str, int]:
    """Blocks of a kernel over relations, with the same layout of lanes."""
    block_d = width_block(num_rows, width)
    return {"BLOCK_E": 4, "BLOCK_D": block_d, "num_warps": max(1, block_d * itemsize // 512)}


def chunk_size(num_rows: int) -> int:
    """Rows of a chunk, 0 for no split. About sqrt(rows) / 2 balances a run's ends against its partials."""
    if num_rows <= UNSPLIT_ROWS:
        return 0
    return min(1024, max(64, triton.next_power_of_2(math.isqrt(num_rows) // 2)))


def chunk_partials(num_rows: int, chunk: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """fp32 [chunks, width] for the hub kernel; the row of a chunk that crosses a boundary is not written or read."""
    return torch.empty(num_rows // chunk if chunk else 0, width, dtype=torch.float32, device=like.device)


@triton.jit
def columns(D, BLOCK_D: tl.constexpr):
    """(number of the program among those of one block of columns, the block's columns o_D, their mask m_D)."""
    num_d = tl.cdiv(D, BLOCK_D)
    o_D = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.program_id(0) // num_d, o_D, o_D < D


@triton.jit
def whole_chunks(begin, end, chunk, SPLIT: tl.constexpr):
    """(first row, number of rows) of begin .. end that the hub kernel summed."""
    first = end
    skip = 0
    if SPLIT:
        first = (begin + chunk - 1) // chunk * chunk
        skip = tl.maximum(end // chunk * chunk - first, 0)
    return first, skip


@triton.jit
def add_partials(b_D, partial_ptr, first, skip, chunk, D, o_D, m_D, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr):
    """b_D plus the partials of the rows first .. first + skip, added in ascending order."""
    if SPLIT:
        end = (first + skip) // chunk
        for start in range(first // chunk, end, BLOCK_M):
            o_M = start + tl.arange(0, BLOCK_M)
            m_MD = (o_M < end)[:, None] & m_D[None, :]
            # [BLOCK_M, BLOCK_D]
            b_MD = tl.load(partial_ptr + o_M.to(tl.int64)[:, None] * D + o_D[None, :], mask=m_MD, other=0.0)
            b_D += tl.sum(b_MD, axis=0)
    return b_D


@triton.jit
def role_of(message, slot_ptr, subject_ptr, object_ptr, ptr_ptr, mid_ptr):
    """(True if the message goes to its relation's subject, end of its run by receiver and role).

    The receiver is one of two objects, and only one of them owns this position as subject, so there is no search.
    """
    i_e = tl.load(slot_ptr + message)
    i_s = tl.load(subject_ptr + i_e)
    as_subject = (tl.load(ptr_ptr + i_s) <= message) & (message < tl.load(mid_ptr + i_s))
    end = tl.load(mid_ptr + i_s) if as_subject else tl.load(ptr_ptr + tl.load(object_ptr + i_e) + 1)
    return as_subject, end


@triton.jit(do_not_specialize=["num_rows"])
def column_sum_kernel(partial_ptr, out_ptr, num_rows, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[d] = sum over rows of partial[:, d], rows in ascending blocks. 4 bytes read an element."""
    o_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_D = o_D < D
    b_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_P):
        o_P = start + tl.arange(0, BLOCK_P)
        m_PD = (o_P < num_rows)[:, None] & m_D[None, :]
        # [BLOCK_P, BLOCK_D]
        b_PD += tl.load(partial_ptr + o_P.to(tl.int64)[:, None] * D + o_D[None, :], mask=m_PD, other=0.0)
    tl.store(out_ptr + o_D, tl.sum(b_PD, axis=0), mask=m_D)


def column_sum(partial_PD: torch.Tensor, dtype: torch.dtype, rows: int = 128) -> torch.Tensor:
    """Second stage of a gradient that many programs sum: fp32 [P, D], contiguous -> [D]. Zero rows give 0.

    rows: a power of two up to 128, rows of a block; fewer give it more columns.
    """
    num_rows, width = partial_PD.shape
    out_D = torch.empty(width, dtype=dtype, device=partial_PD.device)
    block_d = 32 * 128 // rows
    grid = (triton.cdiv(width, block_d),)
    launch(column_sum_kernel, grid, partial_PD, out_D, num_rows, width, BLOCK_P=rows, BLOCK_D=block_d, num_warps=4)
    return out_D
