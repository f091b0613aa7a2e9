"""Message passing and pooling over packed graphs. Letters: N objects, E relations, B graphs, D and H widths.

Index tensors are int32, on the device of the data; values are fp32, fp16 or bf16, accumulated in fp32.
"""

from __future__ import annotations

import torch
from sgg_kernels import reference


def _check(name: str, condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")


def gather_add_relu(
    a_NH: torch.Tensor,
    b_EH: torch.Tensor,
    c_NH: torch.Tensor,
    bias_H: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
) -> torch.Tensor:
    """First linear map of eqs 3, 4, 6 once its GEMMs ran on nodes and relations apart. [E, H].

    a, c: [N, H] (views of one [N, 2H] GEMM are fine), b: [E, H], bias: [H], subject, object: [E].
    Raises ValueError where the shapes do not fit.

    Equivalent PyTorch: `(a[subject] + b + c[object] + bias).relu()`
    """
    _check("gather_add_relu", a_NH.shape == c_NH.shape and a_NH.ndim == 2, "a and c must both be [N, H]")
    _check("gather_add_relu", b_EH.shape == (len(subject_E), a_NH.shape[1]), "b must be [E, H]")
    return reference.gather_add_relu(a_NH, b_EH, c_NH, bias_H, subject_E, object_E)


def scatter_mean(
    y_E3D: torch.Tensor, plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relu, split and mean over messages (eqs 3-6 after the second linear map): ([N, D] means, [E, D] relations).

    y: [E, 3D], columns m_s | r | m_o, bias added, relu not yet applied; plan: `SceneGraphBatch.plan`.
    An object without messages gets 0. Raises ValueError where the shapes do not fit.

    Equivalent PyTorch: `m_s, r, m_o = y.relu().chunk(3, 1);
    zeros(N, D).index_reduce_(0, cat([subject, object]), cat([m_s, m_o]), "mean", include_self=False), r`
    """
    ptr, mid, slot = plan
    _check("scatter_mean", y_E3D.ndim == 2 and y_E3D.shape[1] % 3 == 0, "y must be [E, 3D]")
    _check("scatter_mean", slot.shape[0] == 2 * y_E3D.shape[0], "the plan must hold two messages a relation")
    _check("scatter_mean", ptr.shape[0] == mid.shape[0] + 1, "ptr must be [N+1] and mid [N]")
    return reference.scatter_mean(y_E3D, ptr, mid, slot)


def masked_pool(
    x_ND: torch.Tensor,
    r_ED: torch.Tensor,
    object_ptr: torch.Tensor,
    relation_ptr: torch.Tensor,
    object_mask_N: torch.Tensor,
    relation_mask_E: torch.Tensor,
) -> torch.Tensor:
    """Masked mean per graph over objects and over relations, concatenated: [B, 2D] (the pools of eq. 7).

    x: [N, D], r: [E, D], ptrs: [B+1], masks: [N] and [E] uint8, rows with 0 left out. A graph without a
    counted row gets 0. Raises ValueError where the shapes do not fit.

    Equivalent PyTorch: `stack([cat([x[a:b][mx[a:b] > 0].mean(0), r[c:d][mr[c:d] > 0].mean(0)]) for each graph])`
    """
    _check("masked_pool", x_ND.shape[1:] == r_ED.shape[1:], "x and r must have one width")
    _check("masked_pool", object_mask_N.shape[0] == x_ND.shape[0], "the object mask must be [N]")
    _check("masked_pool", relation_mask_E.shape[0] == r_ED.shape[0], "the relation mask must be [E]")
    return reference.masked_pool(x_ND, r_ED, object_ptr, relation_ptr, object_mask_N, relation_mask_E)


def triple_context(
    s_NH: torch.Tensor,
    r_EH: torch.Tensor,
    o_NH: torch.Tensor,
    pool_BH: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    graph_E: torch.Tensor,
) -> torch.Tensor:
    """Eq. 7, the triple embedding, once its linear maps ran: [E, H].

    s, o: [N, H], r: [E, H], pool: [B, H], subject, object, graph: [E]. Raises ValueError where shapes do not fit.

    Equivalent PyTorch: `s[subject] + r + o[object] + pool[graph]`
    """
    _check("triple_context", s_NH.shape == o_NH.shape, "s and o must both be [N, H]")
    _check("triple_context", r_EH.shape == (len(subject_E), s_NH.shape[1]), "r must be [E, H]")
    _check("triple_context", pool_BH.shape[1:] == s_NH.shape[1:], "pool must be [B, H]")
    return reference.triple_context(s_NH, r_EH, o_NH, pool_BH, subject_E, object_E, graph_E)
