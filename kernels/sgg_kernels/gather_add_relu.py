"""First linear map of a triple convolution after its GEMMs: gather by subject and object, add, relu.

Letters: N objects, E relations, H width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .role_sums import role_sums
from .segments import as_rows, column_sum, columns, tile_options


@triton.jit(do_not_specialize=["num_relations"])
def gather_add_relu_fwd_kernel(
    ac_ptr, b_ptr, bias_ptr, h_ptr, subject_ptr, object_ptr, stride_ac, stride_b, num_relations, H,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h[e] = relu(a[subject] + b[e] + c[object] + bias) with a | c = ac; the sum is in fp32 [1].

    Bytes an element of [E, H] at bf16: 4 (b read, h written); a and c are read from memory once an object (4 N / E)
    and gathered from L2. `kernels/README.md` has the counts of the eager form of every kernel.

    [1] SGG-IG (Wang et al., AAAI-25), eqs 3, 4 and 6.
    """
    i_block, o_H, m_H = columns(H, BLOCK_D)
    o_E = i_block * BLOCK_E + tl.arange(0, BLOCK_E)
    m_E = o_E < num_relations
    m_EH = m_E[:, None] & m_H[None, :]
    i_s = tl.load(subject_ptr + o_E, mask=m_E, other=0).to(tl.int64)[:, None]
    i_o = tl.load(object_ptr + o_E, mask=m_E, other=0).to(tl.int64)[:, None]
    i_e = o_E.to(tl.int64)[:, None]
    # [BLOCK_E, BLOCK_D] each, [BLOCK_D] the bias
    b_EH = tl.load(ac_ptr + i_s * stride_ac + o_H[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(b_ptr + i_e * stride_b + o_H[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(ac_ptr + i_o * stride_ac + (H + o_H)[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(bias_ptr + o_H, mask=m_H, other=0.0).to(tl.float32)[None, :]
    # Not tl.maximum: a NaN must stay NaN.
    tl.store(h_ptr + i_e * H + o_H[None, :], tl.where(b_EH <= 0, 0.0, b_EH), mask=m_EH)


def gather_add_relu_fwd(
    ac_N2H: torch.Tensor,
    b_EH: torch.Tensor,
    bias_H: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
) -> torch.Tensor:
    """[E, H] in the dtype of ac. ac: [N, 2H], columns a | c; b: [E, H]; any row stride."""
    ac_N2H, b_EH, bias_H = as_rows(ac_N2H), as_rows(b_EH), bias_H.contiguous()
    num_relations, width = b_EH.shape
    h_EH = torch.empty(num_relations, width, dtype=ac_N2H.dtype, device=b_EH.device)
    options = tile_options(num_relations, width, b_EH.element_size())
    grid = (triton.cdiv(num_relations, options["BLOCK_E"]) * triton.cdiv(width, options["BLOCK_D"]),)
    launch(
        gather_add_relu_fwd_kernel, grid,
        ac_N2H, b_EH, bias_H, h_EH, subject_E, object_E, ac_N2H.stride(0), b_EH.stride(0), num_relations, width,
        **options,
    )  # fmt: skip
    return h_EH


def gather_add_relu_bwd(
    grad_EH: torch.Tensor,
    h_EH: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    ptr_N1: torch.Tensor,
    mid_N: torch.Tensor,
    slot_2E: torch.Tensor,
    bias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad ac [N, 2H], grad b [E, H], grad bias [H]) from the gradient of h and h; h > 0 is the mask.

    Bytes an element of [E, H] at bf16: 6 (grad and h read, grad b written) and 4 N / E, in two launches.
    """
    width = grad_EH.shape[1]
    grad_ac = torch.empty(len(mid_N), 2 * width, dtype=grad_EH.dtype, device=grad_EH.device)
    grad_b, program_sum = role_sums(
        grad_EH, h_EH, grad_ac[:, :width], grad_ac[:, width:], subject_E, object_E, ptr_N1, mid_N, slot_2E
    )
    assert grad_b is not None
    return grad_ac, grad_b, column_sum(program_sum, bias_dtype)
