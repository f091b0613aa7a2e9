"""Triple embedding of SGG-IG eq. 7 after its linear maps: gather by subject, object and graph, and add.

Letters: N objects, E relations, B graphs, H width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .masked_pool import graph_sum
from .role_sums import role_sums
from .segments import as_rows, column_sum, columns, tile_options


@triton.jit(do_not_specialize=["num_relations"])
def triple_context_fwd_kernel(
    s_ptr, r_ptr, o_ptr, pool_ptr, bias_ptr, out_ptr, subject_ptr, object_ptr, graph_ptr,
    stride_s, stride_r, stride_o, stride_pool, num_relations, H,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[e] = s[subject] + r[e] + o[object] + pool[graph] + bias; the sum is in fp32 [1].

    Bytes an element of [E, H] at bf16: 4 (r read, out written), and 4 N / E + 2 B / E for the rows gathered from L2.

    [1] SGG-IG (Wang et al., AAAI-25), eq. 7.
    """
    i_block, o_H, m_H = columns(H, BLOCK_D)
    o_E = i_block * BLOCK_E + tl.arange(0, BLOCK_E)
    m_E = o_E < num_relations
    m_EH = m_E[:, None] & m_H[None, :]
    i_s = tl.load(subject_ptr + o_E, mask=m_E, other=0).to(tl.int64)[:, None]
    i_o = tl.load(object_ptr + o_E, mask=m_E, other=0).to(tl.int64)[:, None]
    i_g = tl.load(graph_ptr + o_E, mask=m_E, other=0).to(tl.int64)[:, None]
    i_e = o_E.to(tl.int64)[:, None]
    # [BLOCK_E, BLOCK_D] each, [BLOCK_D] the bias
    b_EH = tl.load(s_ptr + i_s * stride_s + o_H[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(r_ptr + i_e * stride_r + o_H[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(o_ptr + i_o * stride_o + o_H[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(pool_ptr + i_g * stride_pool + o_H[None, :], mask=m_EH, other=0.0).to(tl.float32)
    b_EH += tl.load(bias_ptr + o_H, mask=m_H, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + i_e * H + o_H[None, :], b_EH, mask=m_EH)


def triple_context_fwd(
    s_NH: torch.Tensor,
    r_EH: torch.Tensor,
    o_NH: torch.Tensor,
    pool_BH: torch.Tensor,
    bias_H: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    graph_E: torch.Tensor,
) -> torch.Tensor:
    """[E, H] in the dtype of s; rows of any stride."""
    s_NH, r_EH, o_NH, pool_BH = (as_rows(x) for x in (s_NH, r_EH, o_NH, pool_BH))
    bias_H = bias_H.contiguous()
    num_relations, width = r_EH.shape
    out_EH = torch.empty(num_relations, width, dtype=s_NH.dtype, device=r_EH.device)
    options = tile_options(num_relations, width, r_EH.element_size())
    grid = (triton.cdiv(num_relations, options["BLOCK_E"]) * triton.cdiv(width, options["BLOCK_D"]),)
    launch(
        triple_context_fwd_kernel, grid,
        s_NH, r_EH, o_NH, pool_BH, bias_H, out_EH, subject_E, object_E, graph_E,
        s_NH.stride(0), r_EH.stride(0), o_NH.stride(0), pool_BH.stride(0), num_relations, width,
        **options,
    )  # fmt: skip
    return out_EH


def triple_context_bwd(
    grad_EH: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    graph_E: torch.Tensor,
    ptr_N1: torch.Tensor,
    mid_N: torch.Tensor,
    slot_2E: torch.Tensor,
    relation_ptr: torch.Tensor,
    pool_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad s [N, H], grad o [N, H], grad pool [B, H], grad bias [H]); the gradient of r is `grad` itself.

    Bytes an element of [E, H] at bf16: 4 (one read for the objects, one for the graphs, whose rows are contiguous), in
    three launches. A separate bias for each linear map would cost one more pass of 2.
    """
    grad_EH = as_rows(grad_EH)
    grad_s = torch.empty(len(mid_N), grad_EH.shape[1], dtype=grad_EH.dtype, device=grad_EH.device)
    grad_o = torch.empty_like(grad_s)
    _, program_sum = role_sums(grad_EH, None, grad_s, grad_o, subject_E, object_E, ptr_N1, mid_N, slot_2E)
    return grad_s, grad_o, graph_sum(grad_EH, relation_ptr, graph_E, pool_dtype), column_sum(program_sum, bias_dtype)
