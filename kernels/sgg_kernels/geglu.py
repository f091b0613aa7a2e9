"""The gate of Stable Diffusion's feed-forward layers after its linear map. Letters: R rows, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .segments import as_rows, columns


@triton.jit(do_not_specialize=["num_rows"])
def geglu_fwd_kernel(x_ptr, out_ptr, stride_x, num_rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """out = a * gate * Phi(gate) with a | gate = x and Phi the normal distribution function (exact, by erf) [1].

    Bytes an element of [R, D] at bf16: 6 (4 read, 2 written). Eager also writes and reads the gelu: 10.

    [1] Shazeer, GLU variants improve transformer (2020).
    """
    i_block, o_D, m_D = columns(D, BLOCK_D)
    o_R = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_RD = (o_R < num_rows)[:, None] & m_D[None, :]
    i_r = o_R.to(tl.int64)[:, None]
    p_x = x_ptr + i_r * stride_x + o_D[None, :]
    # [BLOCK_R, BLOCK_D] both
    b_a = tl.load(p_x, mask=m_RD, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + D, mask=m_RD, other=0.0).to(tl.float32)
    b_phi = 0.5 + 0.5 * tl.erf(b_gate * 0.7071067811865476)
    tl.store(out_ptr + i_r * D + o_D[None, :], b_a * b_gate * b_phi, mask=m_RD)


@triton.jit(do_not_specialize=["num_rows"])
def geglu_bwd_kernel(
    grad_ptr, x_ptr, grad_x_ptr, stride_grad, stride_x, num_rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """grad a = g gate Phi(gate), grad gate = g a (Phi(gate) + gate phi(gate)); the whole row of x at once.

    Bytes an element of [R, D] at bf16: g and x read (6), grad x written (4). Autograd's backward of the split fills
    two tensors of x's size with zeros and adds them.
    """
    i_block, o_D, m_D = columns(D, BLOCK_D)
    o_R = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_RD = (o_R < num_rows)[:, None] & m_D[None, :]
    i_r = o_R.to(tl.int64)[:, None]
    p_x = x_ptr + i_r * stride_x + o_D[None, :]
    # [BLOCK_R, BLOCK_D] each
    b_g = tl.load(grad_ptr + i_r * stride_grad + o_D[None, :], mask=m_RD, other=0.0).to(tl.float32)
    b_a = tl.load(p_x, mask=m_RD, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + D, mask=m_RD, other=0.0).to(tl.float32)
    b_phi = 0.5 + 0.5 * tl.erf(b_gate * 0.7071067811865476)
    b_density = 0.3989422804014327 * tl.exp(-0.5 * b_gate * b_gate)
    p_grad_x = grad_x_ptr + i_r * (2 * D) + o_D[None, :]
    tl.store(p_grad_x, b_g * b_gate * b_phi, mask=m_RD)
    tl.store(p_grad_x + D, b_g * b_a * (b_phi + b_gate * b_density), mask=m_RD)


def _options(width: int, itemsize: int, rows: int) -> dict[str, int]:
    """Launch options: 16 bytes a lane, a row across all lanes. 256 divides SD's widths (1280, 2560, 5120)."""
    block_d = max(1, min(triton.next_power_of_2(width), 256))
    return {"BLOCK_R": rows, "BLOCK_D": block_d, "num_warps": max(1, block_d * itemsize // 512)}


def geglu_fwd(x_R2D: torch.Tensor) -> torch.Tensor:
    """[R, D] in the dtype of x; rows of any stride."""
    x_R2D = as_rows(x_R2D)
    num_rows, width = x_R2D.shape[0], x_R2D.shape[1] // 2
    out_RD = torch.empty(num_rows, width, dtype=x_R2D.dtype, device=x_R2D.device)
    options = _options(width, x_R2D.element_size(), rows=4)
    grid = (triton.cdiv(num_rows, options["BLOCK_R"]) * triton.cdiv(width, options["BLOCK_D"]),)
    launch(geglu_fwd_kernel, grid, x_R2D, out_RD, x_R2D.stride(0), num_rows, width, **options)
    return out_RD


def geglu_bwd(grad_RD: torch.Tensor, x_R2D: torch.Tensor) -> torch.Tensor:
    """Gradient of x [R, 2D], in its dtype."""
    grad_RD, x_R2D = as_rows(grad_RD), as_rows(x_R2D)
    num_rows, width = grad_RD.shape
    grad_x = torch.empty(num_rows, 2 * width, dtype=x_R2D.dtype, device=x_R2D.device)
    options = _options(width, x_R2D.element_size(), rows=2)  # five streams of a row are in registers at once
    grid = (triton.cdiv(num_rows, options["BLOCK_R"]) * triton.cdiv(width, options["BLOCK_D"]),)
    launch(
        geglu_bwd_kernel, grid, grad_RD, x_R2D, grad_x, grad_RD.stride(0), x_R2D.stride(0), num_rows, width, **options
    )
    return grad_x
