"""`pack`: draw graphs from a packed store into a packed batch, mask it for the auto-encoder and pad it, in one launch.

The definition is `sgg_kernels.reference.pack`. All values that vary from batch to batch (graph ids, offsets, step)
are read from device tensors of fixed shape, so that the launch can be captured.
Letters: B graphs drawn, G = B or B + 1 of them with the padding graph, N objects, E relations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .hash_draw import hash_start, hash_word
from .launch import launch
from .reference.pack import (
    MASK_STREAM,
    PADDING_NAME,
    PADDING_PHRASE,
    PADDING_PREDICATE,
    PPM,
    STORE_FIELDS,
    MaskKey,
    field_shapes,
)

BLOCK = 64
RANK_BLOCK = 32
NUM_WARPS = 2

_NAME = tl.constexpr(PADDING_NAME)
_PREDICATE = tl.constexpr(PADDING_PREDICATE)
_PHRASE = tl.constexpr(PADDING_PHRASE)
_STREAM = tl.constexpr(MASK_STREAM)
_PPM = tl.constexpr(PPM)


@triton.jit
def _mask_objects(p_masked, o_n, num_n, count, h, BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """The mask of one graph: the `count` smallest keys of all objects but the last; a tie goes to the lower index."""
    num_ranked = tl.where(count > 0, num_n - 1, 0)
    for o in range(0, num_n, BLOCK):
        # [BLOCK]
        i = o + tl.arange(0, BLOCK)
        key = hash_word(h, i)
        rank = tl.zeros([BLOCK], dtype=tl.int32)
        for o_j in range(0, num_ranked, RANK_BLOCK):
            # [BLOCK, RANK_BLOCK]
            j = (o_j + tl.arange(0, RANK_BLOCK))[None, :]
            key_j = hash_word(h, j)
            ahead = (key_j < key[:, None]) | ((key_j == key[:, None]) & (j < i[:, None]))
            rank += tl.sum((ahead & (j < num_ranked)).to(tl.int32), 1)
        tl.store(p_masked + o_n + i, (rank < count) & (i < num_ranked), mask=i < num_n)


@triton.jit
def _copy_objects(
    p_name, p_pooled, p_mid, p_ptr, p_out_name, p_out_pooled, p_out_graph, p_out_mid, p_out_ptr,
    i_b, first_n, o_n, num_n, shift_e, BLOCK: tl.constexpr,
):  # fmt: skip
    for o in range(0, num_n, BLOCK):
        # [BLOCK]
        i = o + tl.arange(0, BLOCK)
        m_n = i < num_n
        tl.store(p_out_name + o_n + i, tl.load(p_name + first_n + i, mask=m_n), mask=m_n)
        tl.store(p_out_pooled + o_n + i, tl.load(p_pooled + first_n + i, mask=m_n), mask=m_n)
        tl.store(p_out_graph + o_n + i, i_b, mask=m_n)
        tl.store(p_out_mid + o_n + i, tl.load(p_mid + first_n + i, mask=m_n) + 2 * shift_e, mask=m_n)
        # The end of each object's messages; the start is the previous object's end.
        tl.store(p_out_ptr + o_n + 1 + i, tl.load(p_ptr + first_n + 1 + i, mask=m_n) + 2 * shift_e, mask=m_n)


@triton.jit
def _copy_relations(
    p_name, p_phrase, p_pooled, p_subject, p_object, p_slot,
    p_out_name, p_out_phrase, p_out_pooled, p_out_graph, p_out_subject, p_out_object, p_out_slot,
    i_b, first_e, o_e, num_e, shift_n, BLOCK: tl.constexpr,
):  # fmt: skip
    for o in range(0, num_e, BLOCK):
        # [BLOCK]
        e = o + tl.arange(0, BLOCK)
        m_e = e < num_e
        tl.store(p_out_name + o_e + e, tl.load(p_name + first_e + e, mask=m_e), mask=m_e)
        tl.store(p_out_phrase + o_e + e, tl.load(p_phrase + first_e + e, mask=m_e), mask=m_e)
        tl.store(p_out_pooled + o_e + e, tl.load(p_pooled + first_e + e, mask=m_e), mask=m_e)
        tl.store(p_out_graph + o_e + e, i_b, mask=m_e)
        tl.store(p_out_subject + o_e + e, tl.load(p_subject + first_e + e, mask=m_e) + shift_n, mask=m_e)
        tl.store(p_out_object + o_e + e, tl.load(p_object + first_e + e, mask=m_e) + shift_n, mask=m_e)
    for o in range(0, 2 * num_e, BLOCK):
        # [BLOCK] messages, two a relation
        t = o + tl.arange(0, BLOCK)
        m_t = t < 2 * num_e
        slot = tl.load(p_slot + 2 * first_e + t, mask=m_t)
        tl.store(p_out_slot + 2 * o_e + t, slot + (o_e - first_e), mask=m_t)


@triton.jit
def _pad_objects(
    p_name, p_pooled, p_graph, p_mid, p_ptr, p_masked, i_b, o_n, num_n, o_e, num_e,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for o in range(0, num_n, BLOCK):
        # [BLOCK]
        i = o + tl.arange(0, BLOCK)
        m_n = i < num_n
        first, last = i * num_e // num_n, (i + 1) * num_e // num_n
        tl.store(p_name + o_n + i, _NAME, mask=m_n)
        tl.store(p_pooled + o_n + i, 0, mask=m_n)
        tl.store(p_graph + o_n + i, i_b, mask=m_n)
        tl.store(p_mid + o_n + i, 2 * o_e + first + last, mask=m_n)
        tl.store(p_ptr + o_n + 1 + i, 2 * (o_e + last), mask=m_n)
        if MASKED:
            tl.store(p_masked + o_n + i, 0, mask=m_n)


@triton.jit
def _pad_relations(
    p_name, p_phrase, p_pooled, p_graph, p_subject, p_object, p_slot, i_b, o_n, num_n, o_e, num_e, BLOCK: tl.constexpr
):  # fmt: skip
    for o in range(0, num_e, BLOCK):
        # [BLOCK]
        e = o + tl.arange(0, BLOCK)
        m_e = e < num_e
        owner = ((e + 1) * num_n - 1) // num_e
        tl.store(p_name + o_e + e, _PREDICATE, mask=m_e)
        tl.store(p_phrase + o_e + e, _PHRASE, mask=m_e)
        tl.store(p_pooled + o_e + e, 0, mask=m_e)
        tl.store(p_graph + o_e + e, i_b, mask=m_e)
        tl.store(p_subject + o_e + e, o_n + owner, mask=m_e)
        tl.store(p_object + o_e + e, o_n + owner, mask=m_e)
    for o in range(0, 2 * num_e, BLOCK):
        # [BLOCK] messages: an owner's relations as subject, then as object
        t = o + tl.arange(0, BLOCK)
        owner = ((t // 2 + 1) * num_n - 1) // num_e
        first, last = owner * num_e // num_n, (owner + 1) * num_e // num_n
        slot = t - tl.where(t < first + last, first, last)
        tl.store(p_slot + 2 * o_e + t, o_e + slot, mask=t < 2 * num_e)


@triton.jit(do_not_specialize=["first_copy", "ratio_ppm", "seed"])
def pack_fwd_kernel(
    p_object_name, p_predicate_name, p_phrase, p_subject, p_object, p_object_ptr, p_relation_ptr,
    p_message_ptr, p_message_mid, p_message_slot, p_object_pooled, p_relation_pooled,
    p_ids, p_new_object_ptr, p_new_relation_ptr, p_step,
    p_out_object_name, p_out_predicate_name, p_out_phrase, p_out_subject, p_out_object,
    p_out_message_ptr, p_out_message_mid, p_out_message_slot,
    p_out_object_graph, p_out_relation_graph, p_out_object_pooled, p_out_relation_pooled, p_out_masked,
    first_copy, ratio_ppm, seed,
    MASKED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b copies graph ids[b] of the store into the batch and shifts its indices; the last program pads.

    Bytes: 30 an object (13 read, 17 written; 1 more with the mask), 54 a relation (25 read, 29 written).
    1. The mask (SGG-IG, masked auto-encoder): an object is hidden if its rank by `hash(seed, step, id, stream, i)`
       among the n objects of its graph is below `round(ratio n)`: n^2 compares, in tiles (n <= 30: one tile).
    2. The padding graph: object i of n is both ends of the relations `i m // n .. (i + 1) m // n` of m.
    """
    i_b = tl.program_id(0)
    o_n, o_e = tl.load(p_new_object_ptr + i_b).to(tl.int64), tl.load(p_new_relation_ptr + i_b).to(tl.int64)
    num_n, num_e = tl.load(p_new_object_ptr + i_b + 1) - o_n, tl.load(p_new_relation_ptr + i_b + 1) - o_e
    if i_b == 0:
        tl.store(p_out_message_ptr, 0)
    if PADDED and i_b == tl.num_programs(0) - 1:
        _pad_objects(
            p_out_object_name, p_out_object_pooled, p_out_object_graph, p_out_message_mid, p_out_message_ptr,
            p_out_masked, i_b, o_n, num_n, o_e, num_e, MASKED, BLOCK,
        )  # fmt: skip
        _pad_relations(
            p_out_predicate_name, p_out_phrase, p_out_relation_pooled, p_out_relation_graph, p_out_subject,
            p_out_object, p_out_message_slot, i_b, o_n, num_n, o_e, num_e, BLOCK,
        )  # fmt: skip
    else:
        id_b = tl.load(p_ids + i_b)
        first_n = tl.load(p_object_ptr + id_b).to(tl.int64)
        first_e = tl.load(p_relation_ptr + id_b).to(tl.int64)
        _copy_objects(
            p_object_name, p_object_pooled, p_message_mid, p_message_ptr,
            p_out_object_name, p_out_object_pooled, p_out_object_graph, p_out_message_mid, p_out_message_ptr,
            i_b, first_n, o_n, num_n, o_e - first_e, BLOCK,
        )  # fmt: skip
        _copy_relations(
            p_predicate_name, p_phrase, p_relation_pooled, p_subject, p_object, p_message_slot,
            p_out_predicate_name, p_out_phrase, p_out_relation_pooled, p_out_relation_graph, p_out_subject,
            p_out_object, p_out_message_slot, i_b, first_e, o_e, num_e, o_n - first_n, BLOCK,
        )  # fmt: skip
        if MASKED:
            wanted = ((num_n - 1) * ratio_ppm + _PPM // 2) // _PPM
            count = tl.minimum(tl.maximum(wanted, 1), num_n - 2)
            h = hash_word(hash_word(hash_word(hash_start(seed), tl.load(p_step)), id_b), _STREAM)
            _mask_objects(p_out_masked, o_n, num_n, tl.where(i_b < first_copy, 0, count), h, BLOCK, RANK_BLOCK)


def pack_fwd(
    store: dict[str, torch.Tensor],
    ids_B: torch.Tensor,
    object_ptr: torch.Tensor,
    relation_ptr: torch.Tensor,
    num_objects: int,
    num_relations: int,
    mask: MaskKey | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`sgg_kernels.reference.pack` in one launch; the host gives the totals.

    ids, pointers and step are contiguous int32 on the store's device. Their values may change between replays of a
    captured launch while the last pointers stay `num_objects` and `num_relations`.
    """
    num_graphs = object_ptr.shape[0] - 1
    shapes = field_shapes(num_objects, num_relations)
    out = {name: torch.empty(num, dtype=dtype, device=ids_B.device) for name, (num, dtype) in shapes.items()}
    masked_N = (torch.zeros if mask is None else torch.empty)(num_objects, dtype=torch.bool, device=ids_B.device)
    first_copy, ratio_ppm, seed, step = mask if mask is not None else (0, 0, 0, None)
    launch(
        pack_fwd_kernel,
        (num_graphs,),
        *(store[name] for name in STORE_FIELDS),
        ids_B, object_ptr, relation_ptr, step,
        *out.values(),
        None if mask is None else masked_N.view(torch.uint8),
        first_copy, ratio_ppm, (seed + 2**31) % 2**32 - 2**31,
        MASKED=mask is not None, PADDED=num_graphs > ids_B.shape[0],
        BLOCK=BLOCK, RANK_BLOCK=RANK_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out, masked_N
