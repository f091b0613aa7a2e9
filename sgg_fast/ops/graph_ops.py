"""Message passing and pooling over packed graphs. Letters: N objects, E relations, B graphs, D and H widths.

Index tensors are int32, on the device of the data; values are fp32, fp16 or bf16 (float64 too on the reference),
accumulated in fp32. A plan is `SceneGraphBatch.plan`: it holds every relation once as its subject's message and once
as its object's message; ptr and graph tensors come from the batch. Every floating argument has a gradient.

With SGG_DEBUG=1 in the environment every call also checks the content of its index tensors (it waits for the device).
"""

from __future__ import annotations

import os

import torch
from sgg_kernels import reference

from . import graph_kernels
from .dispatch import backend_for

Aggregation = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(ptr [N+1], mid [N], slot [2E])."""


def check(name: str, condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")


DEBUG = os.environ.get("SGG_DEBUG") == "1"
"""Every call reads its index tensors back and checks them."""


def _check_range(name: str, what: str, index: torch.Tensor, limit: int) -> None:
    if index.numel():
        low, high = int(index.min()), int(index.max())
        check(name, low >= 0 and high < limit, f"{what} must lie in 0..{limit - 1}, not {low}..{high}")


def _check_ptr(name: str, what: str, ptr: torch.Tensor, num_rows: int) -> None:
    rises = bool((ptr.diff() >= 0).all()) and int(ptr[0]) == 0 and int(ptr[-1]) == num_rows
    check(name, rises, f"{what} must rise from 0 to {num_rows}")


def _check_plan(name: str, plan: Aggregation, subject_E: torch.Tensor, object_E: torch.Tensor) -> None:
    ptr, mid, slot = plan
    num_objects, num_relations = mid.shape[0], subject_E.shape[0]
    check(name, slot.shape[0] == 2 * num_relations, "the plan must hold two messages a relation")
    check(name, ptr.shape[0] == num_objects + 1, "ptr must be [N+1] and mid [N]")
    if DEBUG:
        _check_range(name, "subject and object", torch.stack([subject_E, object_E]), num_objects)
        _check_range(name, "slot", slot, num_relations)
        _check_ptr(name, "ptr", ptr, 2 * num_relations)
        check(name, bool(((ptr[:-1] <= mid) & (mid <= ptr[1:])).all()), "mid must lie within ptr")
        position, slot = torch.arange(len(slot), device=slot.device), slot.long()
        receiver = torch.repeat_interleave(torch.arange(num_objects, device=slot.device), ptr.long().diff())
        end = torch.where(position < mid[receiver], subject_E[slot], object_E[slot])
        check(name, bool((end == receiver).all()), "slot must list each object's relations, as subject first")


def _check_rows(name: str, what: str, ptr: torch.Tensor, graph: torch.Tensor) -> None:
    """The rows of graphs, where debugging."""
    if DEBUG:
        _check_ptr(name, f"{what} ptr", ptr, len(graph))
        number = torch.arange(len(ptr) - 1, device=ptr.device)
        owner = torch.repeat_interleave(number, ptr.long().diff())
        check(name, bool((owner == graph).all()), f"{what} graph must follow from its ptr")


def _on_kernels(name: str, values: tuple[torch.Tensor, ...], index: tuple[torch.Tensor, ...]) -> bool:
    """True if the Triton kernels run. Values and indices must share a device; indices must be int32 or a mask."""
    device = values[0].device
    check(name, all(x.device == device for x in (*values, *index)), f"all tensors must be on {device}")
    if backend_for(device, *(x.dtype for x in values)) == "reference":
        return False
    check(name, all(x.dtype in (torch.int32, torch.uint8, torch.bool) for x in index), "index tensors must be int32")
    check(name, all(x.is_contiguous() for x in index), "index tensors must be contiguous")
    return True


def gather_add_relu(
    ac_N2H: torch.Tensor,
    b_EH: torch.Tensor,
    bias_H: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    plan: Aggregation,
) -> torch.Tensor:
    """First linear map of eqs 3, 4, 6 after its separate GEMMs on objects and relations: [E, H] in the dtype of ac.

    ac: [N, 2H], columns a | c of one GEMM (one tensor, so that backward need not concatenate its halves),
    b: [E, H], bias: [H], subject, object: [E]. An object without relations gets gradient 0.
    Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `a, c = ac.chunk(2, 1); (a[subject] + b + c[object] + bias).relu()`
    """
    name = "gather_add_relu"
    check(name, ac_N2H.ndim == 2 and ac_N2H.shape[1] == 2 * bias_H.shape[0], "ac must be [N, 2H] and bias [H]")
    check(name, b_EH.shape == (len(subject_E), bias_H.shape[0]), "b must be [E, H]")
    check(name, subject_E.shape == object_E.shape, "subject and object must both be [E]")
    _check_plan(name, plan, subject_E, object_E)
    check(name, ac_N2H.shape[0] == plan[1].shape[0], "ac must have a row for each object of the plan")
    if _on_kernels(name, (ac_N2H, b_EH, bias_H), (subject_E, object_E, *plan)):
        return graph_kernels.gather_add_relu(ac_N2H, b_EH, bias_H, subject_E, object_E, *plan)
    a_NH, c_NH = ac_N2H.chunk(2, dim=1)
    return reference.gather_add_relu(a_NH, b_EH, c_NH, bias_H, subject_E, object_E)


def scatter_mean(
    y_E3D: torch.Tensor,
    bias_3D: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    plan: Aggregation,
    residual_ED: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias, relu, split and mean over messages (eqs 3-6 after the second GEMM): ([N, D] means, [E, D] relations).

    y: [E, 3D], columns m_s | r' | m_o before bias and relu; bias: [3D]; residual: [E, D], added to r'.
    Means have the dtype of y, relations the wider of y's and the residual's. An object without messages gets 0.
    Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `m_s, r, m_o = (y + bias).relu().chunk(3, 1);
    zeros(N, D).index_reduce_(0, cat([subject, object]), cat([m_s, m_o]), "mean", include_self=False), residual + r`
    """
    name = "scatter_mean"
    check(name, y_E3D.ndim == 2 and y_E3D.shape[1] % 3 == 0, "y must be [E, 3D]")
    check(name, bias_3D.shape == y_E3D.shape[1:], "bias must be [3D]")
    check(name, subject_E.shape == object_E.shape == y_E3D.shape[:1], "subject and object must be [E]")
    _check_plan(name, plan, subject_E, object_E)
    values: tuple[torch.Tensor, ...] = (y_E3D, bias_3D)
    if residual_ED is not None:
        check(name, residual_ED.shape == (y_E3D.shape[0], y_E3D.shape[1] // 3), "the residual must be [E, D]")
        values = (*values, residual_ED)
    if _on_kernels(name, values, (subject_E, object_E, *plan)):
        return graph_kernels.scatter_mean(y_E3D, bias_3D, residual_ED, subject_E, object_E, *plan)
    return reference.scatter_mean(y_E3D, *plan, bias_3D, residual_ED)


def masked_pool(
    x_ND: torch.Tensor,
    r_ED: torch.Tensor,
    object_ptr: torch.Tensor,
    relation_ptr: torch.Tensor,
    object_graph_N: torch.Tensor,
    relation_graph_E: torch.Tensor,
    object_mask_N: torch.Tensor,
    relation_mask_E: torch.Tensor,
) -> torch.Tensor:
    """Masked mean per graph over objects and over relations, concatenated: [B, 2D] (the pools of eq. 7).

    x: [N, D], r: [E, D], ptrs: [B+1], graphs and masks: [N] and [E]; masks are uint8, and rows with 0 do not count. A
    graph without a counted row gets 0. The result has the dtype of x. Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `stack([cat([x[a:b][mx[a:b] > 0].mean(0), r[c:d][mr[c:d] > 0].mean(0)]) for each graph])`
    """
    name = "masked_pool"
    check(name, x_ND.ndim == 2 and x_ND.shape[1:] == r_ED.shape[1:], "x and r must have one width")
    check(name, object_ptr.shape == relation_ptr.shape, "both ptrs must be [B+1]")
    check(name, object_mask_N.shape == object_graph_N.shape == x_ND.shape[:1], "object graph and mask must be [N]")
    check(name, relation_mask_E.shape == relation_graph_E.shape == r_ED.shape[:1], "relation ones must be [E]")
    _check_rows(name, "object", object_ptr, object_graph_N)
    _check_rows(name, "relation", relation_ptr, relation_graph_E)
    graphs, masks = (object_graph_N, relation_graph_E), (object_mask_N, relation_mask_E)
    if _on_kernels(name, (x_ND, r_ED), (object_ptr, relation_ptr, *graphs, *masks)):
        return graph_kernels.masked_pool(x_ND, r_ED, object_ptr, relation_ptr, *graphs, *masks)[0]
    return reference.masked_pool(x_ND, r_ED, object_ptr, relation_ptr, *masks)


def graph_mean(rows_ED: torch.Tensor, ptr_B1: torch.Tensor, graph_E: torch.Tensor) -> torch.Tensor:
    """Mean of the contiguous rows of each graph: [B, D] (X_global before the linear map of eq. 8).

    rows: [E, D], ptr: [B+1], graph: [E]. A graph without rows gets 0. Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `stack([rows[a:b].mean(0) for each graph])`
    """
    check("graph_mean", rows_ED.ndim == 2 and graph_E.shape == rows_ED.shape[:1], "rows must be [E, D], graph [E]")
    _check_rows("graph_mean", "row", ptr_B1, graph_E)
    if _on_kernels("graph_mean", (rows_ED,), (ptr_B1, graph_E)):
        return graph_kernels.graph_mean(rows_ED, ptr_B1, graph_E)[0]
    return reference.graph_mean(rows_ED, ptr_B1)


def triple_context(
    s_NH: torch.Tensor,
    r_EH: torch.Tensor,
    o_NH: torch.Tensor,
    pool_BH: torch.Tensor,
    bias_H: torch.Tensor,
    subject_E: torch.Tensor,
    object_E: torch.Tensor,
    graph_E: torch.Tensor,
    plan: Aggregation,
    relation_ptr: torch.Tensor,
) -> torch.Tensor:
    """Eq. 7, the triple embedding, after its GEMMs: [E, H] in the dtype of s.

    s, o: [N, H], r: [E, H], pool: [B, H], subject, object, graph: [E], relation_ptr: [B+1]. bias: [H] is the sum of the
    biases of the three linear maps, so that backward takes one column sum for all three. An object or a graph without
    relations gets gradient 0. Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `s[subject] + r + o[object] + pool[graph] + bias`
    """
    name = "triple_context"
    check(name, s_NH.ndim == 2 and s_NH.shape == o_NH.shape, "s and o must both be [N, H]")
    check(name, r_EH.shape == (len(subject_E), s_NH.shape[1]), "r must be [E, H]")
    check(name, pool_BH.shape == (relation_ptr.shape[0] - 1, s_NH.shape[1]), "pool must be [B, H]")
    check(name, bias_H.shape == s_NH.shape[1:], "bias must be [H]")
    check(name, subject_E.shape == object_E.shape == graph_E.shape, "subject, object and graph must be [E]")
    _check_plan(name, plan, subject_E, object_E)
    check(name, s_NH.shape[0] == plan[1].shape[0], "s must have a row for each object of the plan")
    _check_rows(name, "relation", relation_ptr, graph_E)
    values, index = (s_NH, r_EH, o_NH, pool_BH, bias_H), (subject_E, object_E, graph_E)
    if _on_kernels(name, values, (*index, *plan, relation_ptr)):
        return graph_kernels.triple_context(*values, *index, *plan, relation_ptr)
    return reference.triple_context(*values[:4], *index, bias_H)
