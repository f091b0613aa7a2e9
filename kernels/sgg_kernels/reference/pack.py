"""Reference of `pack`: draw graphs from a packed store into a packed batch, mask it and pad it.

The store and the batch have the same fields (`sgg_fast.graph.SceneGraphBatch`). Only offsets change, so nothing is
sorted or counted. The host draws the graph ids and computes the offsets from their sizes.
Letters: B graphs drawn, G = B or B + 1 of them with the padding graph, N objects, E relations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .hash import hash_u32

MASK_STREAM = 1
"""Word of the hash key that separates the masks from other random numbers."""
PPM = 1_000_000
"""Denominator of the mask ratio: counts are integers and agree bit for bit."""
PADDING_NAME, PADDING_PREDICATE, PADDING_PHRASE = 0, 1, 0
"""Names of the padding: the two reserved ids of every `NameTable`, and an arbitrary phrase, which is not read."""

_NAMES = ("object_name", "predicate_name", "phrase", "subject", "object")
_MESSAGES = ("message_ptr", "message_mid", "message_slot")
_POOLED = ("object_pooled", "relation_pooled")

STORE_FIELDS = (*_NAMES, "object_ptr", "relation_ptr", *_MESSAGES, *_POOLED)
"""The store's fields that the kernel reads, in the order of its arguments."""
BATCH_FIELDS = (*_NAMES, *_MESSAGES, "object_graph", "relation_graph", *_POOLED)
"""The batch's fields that the kernel writes, in the order of its arguments."""


def field_shapes(num_objects: int, num_relations: int) -> dict[str, tuple[int, torch.dtype]]:
    """Length and dtype of each of BATCH_FIELDS."""
    of_objects = {"object_name", "message_mid", "object_graph", "object_pooled"}
    lengths = {"message_ptr": num_objects + 1, "message_slot": 2 * num_relations} | dict.fromkeys(
        of_objects, num_objects
    )
    dtypes = dict.fromkeys(_POOLED, torch.uint8)
    return {name: (lengths.get(name, num_relations), dtypes.get(name, torch.int32)) for name in BATCH_FIELDS}


class MaskKey(NamedTuple):
    """The inputs of a batch's mask."""

    first_copy: int
    """Index of the first masked copy; all later graphs are masked copies too."""
    ratio_ppm: int
    """Share of a copy's objects to hide, in parts per million."""
    seed: int
    step: torch.Tensor
    """[1] int32 on the device, so that its value may change under a captured launch."""


def concat_ranges(start_B: torch.Tensor, size_B: torch.Tensor) -> torch.Tensor:
    """[start_0 .. start_0 + size_0, start_1 ..] as one int64 index."""
    ends = size_B.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = torch.repeat_interleave(start_B - (ends - size_B), size_B)
    return torch.arange(total, device=start_B.device) + shift


def mask_counts(num_B: torch.Tensor, ratio_ppm: int) -> torch.Tensor:
    """[B] masked objects of graphs with so many objects, without the image node: see `mae_mask`."""
    count_B = (num_B * ratio_ppm + PPM // 2) // PPM
    return torch.minimum(count_B.clamp(min=1), num_B - 1)


def mae_mask(ids_B: torch.Tensor, object_ptr: torch.Tensor, key: MaskKey) -> torch.Tensor:
    """[N] bool: the objects with the smallest hashes in each copy (graphs from `key.first_copy` on).

    The count is `round(ratio * objects)`, halves up; at least one object is masked and at least one is kept. The image
    node (the last object) is never masked. A graph of one object has no mask.
    """
    size_B = object_ptr.long().diff()
    num_B, batch = size_B - 1, torch.arange(len(ids_B), device=ids_B.device)
    graph = torch.repeat_interleave(batch, size_B)
    index = torch.arange(graph.shape[0], device=ids_B.device) - object_ptr.long()[graph]
    hashed = hash_u32(key.seed, key.step, ids_B.long()[graph], MASK_STREAM, index)
    is_image = index == num_B[graph]
    # Rank within the graph: stable sort by (graph, image last, hash), so a tie goes to the lower index.
    order = torch.argsort(graph * 2**34 + is_image.long() * 2**33 + hashed, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    rank = rank - object_ptr.long()[graph]
    count_B = mask_counts(num_B, key.ratio_ppm) * (batch >= key.first_copy)
    return rank < count_B[graph]


def _padding(graph: int, o_n: int, num_n: int, o_e: int, num_e: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The fields of the padding graph; its objects and relations start at o_n and o_e.

    Object i of n is subject and object of the relations `i m // n .. (i + 1) m // n` of m.
    """
    bounds = torch.arange(num_n + 1, device=device) * num_e // max(num_n, 1)
    first, last = bounds[:-1], bounds[1:]
    owner = torch.repeat_interleave(torch.arange(num_n, device=device), last - first)
    zero_N, zero_E = torch.zeros_like(first), torch.zeros_like(owner)
    return {
        "object_name": zero_N + PADDING_NAME,
        "predicate_name": zero_E + PADDING_PREDICATE,
        "phrase": zero_E + PADDING_PHRASE,
        "subject": o_n + owner,
        "object": o_n + owner,
        "message_ptr": 2 * (o_e + last),
        "message_mid": 2 * o_e + first + last,
        "message_slot": o_e + concat_ranges(first.repeat_interleave(2), (last - first).repeat_interleave(2)),
        "object_graph": zero_N + graph,
        "relation_graph": zero_E + graph,
        "object_pooled": zero_N,
        "relation_pooled": zero_E,
    }


def _drawn(
    store: dict[str, torch.Tensor], ids_B: torch.Tensor, object_ptr: torch.Tensor, relation_ptr: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The concatenated fields of the drawn graphs."""
    ids_B = ids_B.long()
    num_N, num_E = object_ptr.long().diff(), relation_ptr.long().diff()
    first_N, first_E = store["object_ptr"].long()[ids_B], store["relation_ptr"].long()[ids_B]
    rows_N, rows_E = concat_ranges(first_N, num_N), concat_ranges(first_E, num_E)
    batch = torch.arange(len(ids_B), device=ids_B.device)
    graph_N, graph_E = torch.repeat_interleave(batch, num_N), torch.repeat_interleave(batch, num_E)
    shift_N, shift_E = object_ptr[:-1] - first_N, relation_ptr[:-1] - first_E
    return {
        "object_name": store["object_name"][rows_N],
        "predicate_name": store["predicate_name"][rows_E],
        "phrase": store["phrase"][rows_E],
        "subject": store["subject"][rows_E] + shift_N[graph_E],
        "object": store["object"][rows_E] + shift_N[graph_E],
        "message_ptr": torch.cat([num_N.new_zeros(1), store["message_ptr"][rows_N + 1] + 2 * shift_E[graph_N]]),
        "message_mid": store["message_mid"][rows_N] + 2 * shift_E[graph_N],
        "message_slot": store["message_slot"][concat_ranges(2 * first_E, 2 * num_E)]
        + torch.repeat_interleave(shift_E, 2 * num_E),
        "object_graph": graph_N,
        "relation_graph": graph_E,
        "object_pooled": store["object_pooled"][rows_N],
        "relation_pooled": store["relation_pooled"][rows_E],
    }


def pack(
    store: dict[str, torch.Tensor],
    ids_B: torch.Tensor,
    object_ptr: torch.Tensor,
    relation_ptr: torch.Tensor,
    mask: MaskKey | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(BATCH_FIELDS, masked) of the graphs `ids` of `store` at the offsets `object_ptr` and `relation_ptr`.

    The pointers are [B+1], or [B+2] to append the padding graph; padding relations need a padding object. masked: [N]
    bool, False in the padding and without `mask`.
    """
    num_graphs = len(ids_B)
    ptrs = object_ptr[: num_graphs + 1], relation_ptr[: num_graphs + 1]
    out = _drawn(store, ids_B, *ptrs)
    masked_N = out["object_name"].new_zeros(out["object_name"].shape, dtype=torch.bool)
    if mask is not None:
        masked_N = mae_mask(ids_B, ptrs[0], mask)
    if len(object_ptr) > num_graphs + 1:
        (o_n, end_n), (o_e, end_e) = object_ptr[num_graphs:].tolist(), relation_ptr[num_graphs:].tolist()
        padding = _padding(num_graphs, o_n, end_n - o_n, o_e, end_e - o_e, ids_B.device)
        out = {name: torch.cat([tensor, padding[name]]) for name, tensor in out.items()}
        masked_N = torch.cat([masked_N, masked_N.new_zeros(end_n - o_n)])
    return {name: t.to(torch.uint8 if name in _POOLED else torch.int32) for name, t in out.items()}, masked_N
