"""Reference of `pack`: draw graphs from a packed store into a packed batch, and choose the masked objects.

The store and the batch have the same fields (`sgg_fast.graph.SceneGraphBatch`); only offsets change, so nobody
sorts or counts. Sizes come from the host, which drew the graph ids.
"""

from __future__ import annotations

import torch

from .hash import hash_u32

MASK_STREAM = 1
"""Word of the hash key that keeps the masks apart from other random numbers."""


def concat_ranges(start_B: torch.Tensor, size_B: torch.Tensor) -> torch.Tensor:
    """[start_0 .. start_0 + size_0, start_1 ..] as one int64 index."""
    ends = size_B.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = torch.repeat_interleave(start_B - (ends - size_B), size_B)
    return torch.arange(total, device=start_B.device) + shift


def mae_mask(
    object_ptr: torch.Tensor, masked_B: torch.Tensor, sample_B: torch.Tensor, ratio: float, seed: int, step: int
) -> torch.Tensor:
    """[N] bool: in each graph with masked_B set, the `ratio` of its objects with the smallest hash keys.

    The image node (the last object) is never masked; at least one object is masked and one kept, and
    a graph of one object is left whole. The count is `round(ratio * objects)`, halves up.
    """
    size_B = object_ptr.long().diff()
    num_B = size_B - 1
    graph = torch.repeat_interleave(torch.arange(size_B.shape[0], device=size_B.device), size_B)
    index = torch.arange(graph.shape[0], device=size_B.device) - object_ptr.long()[graph]
    key = hash_u32(seed, step, sample_B.long()[graph], MASK_STREAM, index)
    is_image = index == num_B[graph]
    # Rank within the graph: sort by (graph, image last, key); stable, so ties go to the lower index.
    order = torch.argsort(graph * 2**34 + is_image.long() * 2**33 + key, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    rank = rank - object_ptr.long()[graph]
    count_B = torch.minimum((ratio * num_B + 0.5).floor().long().clamp(min=1), num_B - 1) * masked_B.long()
    return rank < count_B[graph]


def pack(store: dict[str, torch.Tensor], graph_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """The graphs `graph_B` of `store` end to end. Both dicts hold the tensors of `SceneGraphBatch` by name."""
    graph_B = graph_B.long()
    object_ptr, relation_ptr = store["object_ptr"].long(), store["relation_ptr"].long()
    first_N, num_N = object_ptr[graph_B], object_ptr[graph_B + 1] - object_ptr[graph_B]
    first_E, num_E = relation_ptr[graph_B], relation_ptr[graph_B + 1] - relation_ptr[graph_B]
    zero = num_N.new_zeros(1)
    new_object_ptr, new_relation_ptr = torch.cat([zero, num_N.cumsum(0)]), torch.cat([zero, num_E.cumsum(0)])
    rows_N, rows_E = concat_ranges(first_N, num_N), concat_ranges(first_E, num_E)
    rows_2E = concat_ranges(2 * first_E, 2 * num_E)
    batch = torch.arange(len(graph_B), device=graph_B.device)
    graph_N, graph_E = torch.repeat_interleave(batch, num_N), torch.repeat_interleave(batch, num_E)
    shift_N, shift_E = new_object_ptr[:-1] - first_N, new_relation_ptr[:-1] - first_E

    out = {
        "object_name": store["object_name"][rows_N],
        "predicate_name": store["predicate_name"][rows_E],
        "subject": store["subject"][rows_E] + shift_N[graph_E],
        "object": store["object"][rows_E] + shift_N[graph_E],
        "object_ptr": new_object_ptr,
        "relation_ptr": new_relation_ptr,
        "message_ptr": torch.cat([zero, store["message_ptr"][rows_N + 1] + 2 * shift_E[graph_N]]),
        "message_mid": store["message_mid"][rows_N] + 2 * shift_E[graph_N],
        "message_slot": store["message_slot"][rows_2E] + torch.repeat_interleave(shift_E, 2 * num_E),
        "object_graph": graph_N,
        "relation_graph": graph_E,
    }
    out = {name: tensor.to(torch.int32) for name, tensor in out.items()}
    out["object_pooled"] = store["object_pooled"][rows_N]
    out["relation_pooled"] = store["relation_pooled"][rows_E]
    return out
