"""`adam`: one Adam step over flat fp32 buffers, gradients read where backward left them. Definition: `reference.adam`.

Three launches whatever the number of parameters: squares of the gradients by chunk, one program that decides, and the
update. Nothing is read back; everything that varies from step to step lies in device tensors, so that the launches
can be captured. Letters: P elements of the flat buffers, K chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .reference.adam import (
    APPLIED,
    CORRECTION_1,
    CORRECTION_2,
    FACTOR,
    INVERSE_SCALE,
    LR,
    NORM,
    Hyper,
)

BLOCK = 1024
"""Elements of a chunk."""
NUM_WARPS = 4
DECIDE_BLOCK = 1024

_LR, _INVERSE_SCALE, _FACTOR = tl.constexpr(LR), tl.constexpr(INVERSE_SCALE), tl.constexpr(FACTOR)
_APPLIED, _NORM = tl.constexpr(APPLIED), tl.constexpr(NORM)
_C1, _C2 = tl.constexpr(CORRECTION_1), tl.constexpr(CORRECTION_2)


@triton.jit
def _load_grad(p_table, i_k, BLOCK: tl.constexpr):
    """Chunk i_k's gradients, 0 beyond its end, and the offsets and mask of its elements in the flat buffers.

    Reads whole 16 bytes: up to three elements past a gradient's end, within its allocation.
    """
    address = tl.load(p_table + 3 * i_k)
    o_k = tl.multiple_of(tl.load(p_table + 3 * i_k + 1), 16)
    num = tl.load(p_table + 3 * i_k + 2).to(tl.int32)
    p_grad = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    i = tl.arange(0, BLOCK)
    m_k = i < tl.multiple_of((num + 3) // 4 * 4, 4)
    # [BLOCK]
    g = tl.load(p_grad + i, mask=m_k, other=0.0)
    return tl.where(i < num, g, 0.0), o_k + i, m_k


@triton.jit
def adam_squares_kernel(p_table, p_squares, BLOCK: tl.constexpr):
    """Sum of squares of each chunk's gradients. Bytes: 4 an element."""
    i_k = tl.program_id(0).to(tl.int64)
    g, _, _ = _load_grad(p_table, i_k, BLOCK)
    tl.store(p_squares + i_k, tl.sum(g * g, 0))


@triton.jit
def adam_decide_kernel(
    p_squares, p_control, p_step, num_chunks, beta_1, beta_2, max_norm, CLIP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: norm, clipping, whether the step is applied, and the corrections `c = beta c + (1 - beta)`."""
    # [BLOCK]
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for o in range(0, num_chunks, BLOCK):
        k = o + tl.arange(0, BLOCK)
        m_k = k < tl.multiple_of((num_chunks + 3) // 4 * 4, 4)
        total += tl.where(k < num_chunks, tl.load(p_squares + k, mask=m_k, other=0.0), 0.0)
    inverse_scale = tl.load(p_control + _INVERSE_SCALE)
    norm = tl.sqrt(tl.sum(total, 0)) * inverse_scale
    applied = norm < float("inf")  # false for NaN as well
    factor = inverse_scale
    if CLIP:
        factor = inverse_scale * tl.minimum(max_norm / (norm + 1e-6), 1.0)
    c_1, c_2 = tl.load(p_control + _C1), tl.load(p_control + _C2)
    tl.store(p_control + _C1, tl.where(applied, c_1 * beta_1 + (1 - beta_1), c_1))
    tl.store(p_control + _C2, tl.where(applied, c_2 * beta_2 + (1 - beta_2), c_2))
    tl.store(p_control + _APPLIED, applied.to(tl.float32))
    tl.store(p_control + _FACTOR, factor)
    tl.store(p_control + _NORM, norm)
    tl.store(p_step, tl.load(p_step) + applied.to(tl.int32))


@triton.jit
def adam_kernel(p_param, p_m, p_v, p_table, p_control, beta_1, beta_2, eps, BLOCK: tl.constexpr):
    """m += (1 - beta_1)(g - m); v += (1 - beta_2)(g^2 - v); p -= lr / c_1 m / (sqrt(v / c_2) + eps), g scaled first.

    Bytes: 28 an element (16 read, 12 written). 1. Kingma and Ba, 2015, algorithm 1.
    """
    if tl.load(p_control + _APPLIED) > 0:
        g, i, m_k = _load_grad(p_table, tl.program_id(0).to(tl.int64), BLOCK)
        g = g * tl.load(p_control + _FACTOR)
        # [BLOCK]
        m = tl.load(p_m + i, mask=m_k, other=0.0)
        v = tl.load(p_v + i, mask=m_k, other=0.0)
        p = tl.load(p_param + i, mask=m_k, other=0.0)
        m += (1 - beta_1) * (g - m)
        v = beta_2 * v + (1 - beta_2) * g * g
        rate = tl.load(p_control + _LR) / tl.load(p_control + _C1)
        spread = tl.sqrt(v) / tl.sqrt(tl.load(p_control + _C2)) + eps
        tl.store(p_m + i, m, mask=m_k)
        tl.store(p_v + i, v, mask=m_k)
        tl.store(p_param + i, p - rate * m / spread, mask=m_k)


def adam_table(addresses: list[int], offsets: list[int], numels: list[int]) -> torch.Tensor:
    """[K, 3] int64 on the host: address of each chunk's gradients, its offset in the flat buffers, its elements.

    Addresses must be multiples of 16 bytes, offsets of 16 elements.
    """
    assert all(address % 16 == 0 for address in addresses), "a gradient does not start on 16 bytes"
    assert all(offset % 16 == 0 for offset in offsets)
    rows = [
        (address + 4 * first, offset + first, min(BLOCK, num - first))
        for address, offset, num in zip(addresses, offsets, numels, strict=True)
        for first in range(0, num, BLOCK)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def adam_step(
    param_P: torch.Tensor,
    moment_1_P: torch.Tensor,
    moment_2_P: torch.Tensor,
    table_K3: torch.Tensor,
    control: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """`reference.adam` in place; the gradients are those whose addresses stand in `table` when the launches run."""
    num_chunks = table_K3.shape[0]
    squares_K = torch.empty(num_chunks + 3, dtype=torch.float32, device=param_P.device)
    launch(adam_squares_kernel, (num_chunks,), table_K3, squares_K, BLOCK=BLOCK, num_warps=NUM_WARPS)
    launch(
        adam_decide_kernel, (1,), squares_K, control, step, num_chunks, hyper.beta_1, hyper.beta_2, hyper.max_norm,
        CLIP=hyper.max_norm > 0, BLOCK=DECIDE_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        adam_kernel, (num_chunks,), param_P, moment_1_P, moment_2_P, table_K3, control,
        hyper.beta_1, hyper.beta_2, hyper.eps, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
