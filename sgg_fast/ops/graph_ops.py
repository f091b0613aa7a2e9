"""Message passing and pooling over packed graphs. Letters: N objects, E relations, B graphs, D and H widths.

Index tensors are int32, on the device of the values; values are fp32, fp16 or bf16 (float64 too on the reference),
accumulated in fp32. All indices come from the batch; its plan holds every relation once as its subject's message and
once as its object's message. Every floating argument has a gradient.

With SGG_DEBUG=1 in the environment every call also checks the content of its index tensors (it waits for the device).
"""

from __future__ import annotations

import os

import torch
from sgg_kernels import reference

from sgg_fast.graph import SceneGraphBatch

from . import graph_kernels
from .dispatch import backend_for


def check(name: str, condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")


DEBUG = os.environ.get("SGG_DEBUG") == "1"
"""Every call reads its index tensors back and checks them."""


def _check_range(name: str, what: str, index: torch.Tensor, limit: int) -> None:
    if index.numel():
        low, high = int(index.min()), int(index.max())
        check(name, low >= 0 and high < limit, f"{what} must lie in 0..{limit - 1}, not {low}..{high}")


def _owners(name: str, what: str, ptr: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[rows] index of the group that owns each row."""
    rises = bool((ptr.diff() >= 0).all()) and int(ptr[0]) == 0 and int(ptr[-1]) == num_rows
    check(name, rises, f"{what} ptr must rise from 0 to {num_rows}")
    return torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.long().diff())


def _check_rows(name: str, what: str, ptr: torch.Tensor, graph: torch.Tensor) -> None:
    same = bool((_owners(name, what, ptr, len(graph)) == graph).all())
    check(name, same, f"{what} graph must follow from its ptr")


def _check_batch(name: str, batch: SceneGraphBatch) -> None:
    """Check the content of a batch's index tensors."""
    _check_rows(name, "object", batch.object_ptr, batch.object_graph)
    _check_rows(name, "relation", batch.relation_ptr, batch.relation_graph)
    ptr, mid, slot = batch.plan
    _check_range(name, "subject and object", torch.stack([batch.subject, batch.object]), batch.num_objects)
    _check_range(name, "slot", slot, batch.num_relations)
    receiver = _owners(name, "plan", ptr, 2 * batch.num_relations)
    check(name, bool(((ptr[:-1] <= mid) & (mid <= ptr[1:])).all()), "mid must lie within the plan's ptr")
    as_subject, slot = torch.arange(len(slot), device=slot.device) < mid[receiver], slot.long()
    end = torch.where(as_subject, batch.subject[slot], batch.object[slot])
    check(name, bool((end == receiver).all()), "slot must list each object's relations, as subject first")


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
    ac_N2H: torch.Tensor, b_EH: torch.Tensor, bias_H: torch.Tensor, batch: SceneGraphBatch
) -> torch.Tensor:
    """First linear map of eqs 3, 4, 6 after its separate GEMMs on objects and relations: [E, H] in the dtype of ac.

    ac: [N, 2H], columns a | c of one GEMM (one tensor, so that backward need not concatenate its halves),
    b: [E, H], bias: [H]. An object without relations gets gradient 0. Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `a, c = ac.chunk(2, 1); (a[subject] + b + c[object] + bias).relu()`
    """
    name, width = "gather_add_relu", bias_H.shape[0]
    if DEBUG:
        _check_batch(name, batch)
    check(name, ac_N2H.shape == (batch.num_objects, 2 * width), "ac must be [N, 2H] and bias [H]")
    check(name, b_EH.shape == (batch.num_relations, width), "b must be [E, H]")
    ends = batch.subject, batch.object
    if _on_kernels(name, (ac_N2H, b_EH, bias_H), (*ends, *batch.plan)):
        return graph_kernels.gather_add_relu(ac_N2H, b_EH, bias_H, *ends, *batch.plan)
    a_NH, c_NH = ac_N2H.chunk(2, dim=1)
    return reference.gather_add_relu(a_NH, b_EH, c_NH, bias_H, *ends)


def scatter_mean(
    y_E3D: torch.Tensor, bias_3D: torch.Tensor, batch: SceneGraphBatch, residual_ED: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias, relu, split and mean over messages (eqs 3-6 after the second GEMM): ([N, D] means, [E, D] relations).

    y: [E, 3D], columns m_s | r' | m_o before bias and relu; bias: [3D]; residual: [E, D], added to r'.
    Means have the dtype of y, relations the wider of y's and the residual's. An object without messages gets 0.
    Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `m_s, r, m_o = (y + bias).relu().chunk(3, 1);
    zeros(N, D).index_reduce_(0, cat([subject, object]), cat([m_s, m_o]), "mean", include_self=False), residual + r`
    """
    name, width = "scatter_mean", y_E3D.shape[-1] // 3
    if DEBUG:
        _check_batch(name, batch)
    check(name, y_E3D.shape == (batch.num_relations, 3 * width), "y must be [E, 3D]")
    check(name, bias_3D.shape == (3 * width,), "bias must be [3D]")
    values: tuple[torch.Tensor, ...] = (y_E3D, bias_3D)
    if residual_ED is not None:
        check(name, residual_ED.shape == (batch.num_relations, width), "the residual must be [E, D]")
        values = (*values, residual_ED)
    index = batch.subject, batch.object, *batch.plan
    if _on_kernels(name, values, index):
        return graph_kernels.scatter_mean(y_E3D, bias_3D, residual_ED, *index)
    return reference.scatter_mean(y_E3D, *batch.plan, bias_3D, residual_ED)


def masked_pool(x_ND: torch.Tensor, r_ED: torch.Tensor, batch: SceneGraphBatch) -> torch.Tensor:
    """Mean per graph over the pooled objects and over the pooled relations, concatenated: [B, 2D] (eq. 7's pools).

    x: [N, D], r: [E, D]. A graph without a pooled row gets 0. The result has the dtype of x. Raises ValueError if the
    shapes do not fit.

    Equivalent PyTorch: `stack([cat([x[a:b][mx[a:b] > 0].mean(0), r[c:d][mr[c:d] > 0].mean(0)]) for each graph])`
    """
    name, width = "masked_pool", x_ND.shape[-1]
    if DEBUG:
        _check_batch(name, batch)
    check(name, x_ND.shape == (batch.num_objects, width), "x must be [N, D]")
    check(name, r_ED.shape == (batch.num_relations, width), "r must be [E, D], of the width of x")
    ptrs, masks = (batch.object_ptr, batch.relation_ptr), (batch.object_pooled, batch.relation_pooled)
    index = *ptrs, batch.object_graph, batch.relation_graph, *masks
    if _on_kernels(name, (x_ND, r_ED), index):
        return graph_kernels.masked_pool(x_ND, r_ED, *index)[0]
    return reference.masked_pool(x_ND, r_ED, *ptrs, *masks)


def graph_mean(rows_ED: torch.Tensor, ptr_B1: torch.Tensor, graph_E: torch.Tensor) -> torch.Tensor:
    """Mean of the contiguous rows of each graph: [B, D] (X_global before the linear map of eq. 8).

    rows: [E, D], ptr: [B+1], graph: [E]. A graph without rows gets 0. Raises ValueError if the shapes do not fit.

    Equivalent PyTorch: `stack([rows[a:b].mean(0) for each graph])`
    """
    check("graph_mean", rows_ED.ndim == 2 and graph_E.shape == rows_ED.shape[:1], "rows must be [E, D], graph [E]")
    if DEBUG:
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
    batch: SceneGraphBatch,
) -> torch.Tensor:
    """Eq. 7, the triple embedding, after its GEMMs: [E, H] in the dtype of s.

    s, o: [N, H], r: [E, H], pool: [B, H]. bias: [H] is the sum of the biases of the three linear maps, so that backward
    takes one column sum for all three. An object or a graph without relations gets gradient 0. Raises ValueError if the
    shapes do not fit.

    Equivalent PyTorch: `s[subject] + r + o[object] + pool[graph] + bias`
    """
    name, width = "triple_context", bias_H.shape[0]
    if DEBUG:
        _check_batch(name, batch)
    check(name, s_NH.shape == o_NH.shape == (batch.num_objects, width), "s and o must be [N, H] and bias [H]")
    check(name, r_EH.shape == (batch.num_relations, width), "r must be [E, H]")
    check(name, pool_BH.shape == (batch.num_graphs, width), "pool must be [B, H]")
    values, index = (s_NH, r_EH, o_NH, pool_BH, bias_H), (batch.subject, batch.object, batch.relation_graph)
    if _on_kernels(name, values, (*index, *batch.plan, batch.relation_ptr)):
        return graph_kernels.triple_context(*values, *index, *batch.plan, batch.relation_ptr)
    return reference.triple_context(*values[:4], *index, bias_H)
