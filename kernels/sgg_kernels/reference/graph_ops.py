"""Pure-torch form of every graph-side kernel; the Triton kernels are tested against it.

Letters: N objects, E relations, B graphs, D width, H hidden width. Any floating dtype; sums run in fp32 (float64
for float64 inputs) and are rounded once at the end. Empty groups give 0.
"""

from __future__ import annotations

import torch


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def gather_add_relu(
    a_NH: torch.Tensor,
    b_EH: torch.Tensor,
    c_NH: torch.Tensor,
    bias_H: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
) -> torch.Tensor:
    """`relu(a[subject] + b + c[object] + bias)`, [E, H]: the first linear map of eqs 3, 4 and 6 after its GEMMs."""
    acc = _accumulator(a_NH)
    total_EH = a_NH[subject_E].to(acc) + b_EH.to(acc) + c_NH[object_E].to(acc) + bias_H.to(acc)
    return total_EH.relu().to(a_NH.dtype)


def scatter_mean(
    y_E3D: torch.Tensor,
    ptr_N1: torch.Tensor,
    mid_N: torch.Tensor,
    slot_2E: torch.Tensor,
    bias_3D: torch.Tensor | None = None,
    residual_ED: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs 3-6 after the second linear map: `m_s, r', m_o = split(relu(y + bias))`; each object's mean of its messages.

    Object i receives m_s of the relations slot[ptr[i]:mid[i]] and m_o of slot[mid[i]:ptr[i+1]].
    Returns ([N, D] means in the dtype of y, [E, D] residual + r' in the wider of y's and the residual's).
    """
    num_objects, dtype, acc = mid_N.shape[0], y_E3D.dtype, _accumulator(y_E3D)
    total_E3D = y_E3D.to(acc) if bias_3D is None else y_E3D.to(acc) + bias_3D.to(acc)
    m_s_ED, r_ED, m_o_ED = total_E3D.relu().chunk(3, dim=1)
    position = torch.arange(slot_2E.shape[0], device=slot_2E.device)
    receiver = torch.repeat_interleave(
        torch.arange(num_objects, device=slot_2E.device), ptr_N1.long().diff(), output_size=slot_2E.shape[0]
    )
    as_subject = (position < mid_N[receiver])[:, None]
    message = torch.where(as_subject, m_s_ED[slot_2E], m_o_ED[slot_2E])
    total_ND = message.new_zeros(num_objects, message.shape[1]).index_add(0, receiver, message)
    degree_N1 = ptr_N1.diff().clamp(min=1)[:, None].to(acc)
    if residual_ED is not None:
        r_ED, dtype_r = r_ED + residual_ED.to(acc), torch.promote_types(dtype, residual_ED.dtype)
    else:
        dtype_r = dtype
    return (total_ND / degree_N1).to(dtype), r_ED.to(dtype_r)


def _mean(rows: torch.Tensor, ptr_B1: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of each graph's rows, [B, D]; the weights are 0 or 1."""
    sizes = ptr_B1.long().diff()
    graph = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), sizes, output_size=rows.shape[0])
    total = rows.new_zeros(len(sizes), rows.shape[1], dtype=weight.dtype)
    total = total.index_add(0, graph, rows.to(weight.dtype).where(weight[:, None] != 0, 0))  # NaN * 0 would be NaN
    count = weight.new_zeros(len(sizes)).index_add(0, graph, weight)
    return (total / count.clamp(min=1)[:, None]).to(rows.dtype)


def graph_mean(rows_ED: torch.Tensor, ptr_B1: torch.Tensor) -> torch.Tensor:
    """Mean of each graph's rows, [B, D]: X_global before the linear map of eq. 8."""
    return _mean(rows_ED, ptr_B1, rows_ED.new_ones(len(rows_ED), dtype=_accumulator(rows_ED)))


def masked_pool(
    x_ND: torch.Tensor,
    r_ED: torch.Tensor,
    object_ptr: torch.Tensor,
    relation_ptr: torch.Tensor,
    object_mask_N: torch.Tensor,
    relation_mask_E: torch.Tensor,
) -> torch.Tensor:
    """`concat(mean of x, mean of r)` over each graph's rows whose mask is non-zero, [B, 2D] (the pools of eq. 7)."""
    sides = ((x_ND, object_ptr, object_mask_N), (r_ED, relation_ptr, relation_mask_E))
    return torch.cat([_mean(rows, ptr, (mask != 0).to(_accumulator(rows))) for rows, ptr, mask in sides], dim=1)


def triple_context(
    s_NH: torch.Tensor,
    r_EH: torch.Tensor,
    o_NH: torch.Tensor,
    pool_BH: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    graph_E: torch.Tensor,
    bias_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 7: `s[subject] + r + o[object] + pool[graph] + bias`, [E, H]; s = f_s(x), r = f_r(r), o = f_o(x)."""
    acc = _accumulator(s_NH)
    total_EH = s_NH[subject_E].to(acc) + r_EH.to(acc) + o_NH[object_E].to(acc) + pool_BH[graph_E].to(acc)
    if bias_H is not None:
        total_EH = total_EH + bias_H.to(acc)
    return total_EH.to(s_NH.dtype)
