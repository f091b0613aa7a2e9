"""Drawing a batch from the packed store of a whole data set. Letters: B graphs drawn, N objects, E relations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from sgg_kernels import reference
from sgg_kernels.reference.pack import BATCH_FIELDS, PPM, STORE_FIELDS, MaskKey

from sgg_fast.graph import SceneGraphBatch

from .dispatch import backend_for

MAX_ROWS = 2**28
"""Of a batch: far enough below int32 that sums and doubles of indices stay within it."""

_ALIGN = 4
"""int32 words: 16 bytes, so that a pointer's alignment, which a kernel is compiled for, is the same in every batch."""


@dataclasses.dataclass(frozen=True)
class MaskDraw:
    """Which objects the masked auto-encoder hides: a hash of (seed, step, graph id, object), the same everywhere."""

    first_copy: int
    """The graphs of the batch from this index on are the copies that get masked."""
    ratio: float
    """Share of a copy's objects, to six decimals; rounded to whole objects, halves up."""
    seed: int
    """Of the run; its low 32 bits count."""
    step: int | torch.Tensor
    """Of the run. As a device tensor ([1] int32) it may change under a captured launch."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"pack: the mask ratio must lie between 0 and 1, not {self.ratio}")


@torch.library.custom_op("sgg_fast::pack", mutates_args=())
def _pack(
    store: Sequence[torch.Tensor],
    ids: torch.Tensor,
    object_ptr: torch.Tensor,
    relation_ptr: torch.Tensor,
    step: torch.Tensor | None,
    num_objects: int,
    num_relations: int,
    first_copy: int,
    ratio_ppm: int,
    seed: int,
    backend: str,
) -> list[torch.Tensor]:
    """BATCH_FIELDS and the mask; store is STORE_FIELDS in order, the rest as `sgg_kernels.pack.pack_fwd` takes it."""
    fields = dict(zip(STORE_FIELDS, store, strict=True))
    mask = None if step is None else MaskKey(first_copy, ratio_ppm, seed, step)
    if backend == "reference":
        out, masked_N = reference.pack(fields, ids, object_ptr, relation_ptr, mask)
    else:
        from sgg_kernels.pack import pack_fwd

        out, masked_N = pack_fwd(fields, ids, object_ptr, relation_ptr, num_objects, num_relations, mask)
    return [*(out[name] for name in BATCH_FIELDS), masked_N]


@_pack.register_fake
def _(store, ids, object_ptr, relation_ptr, step, num_objects, num_relations, first_copy, ratio_ppm, seed, backend):
    sizes = {"message_ptr": num_objects + 1, "message_slot": 2 * num_relations, "object_graph": num_objects,
             "object_name": num_objects, "message_mid": num_objects, "object_pooled": num_objects}  # fmt: skip
    out = [
        ids.new_empty(sizes.get(name, num_relations), dtype=torch.uint8 if name.endswith("pooled") else torch.int32)
        for name in BATCH_FIELDS
    ]
    return [*out, ids.new_empty(num_objects, dtype=torch.bool)]


def _ship(rows: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Host integers, wrapped to int32, on `device`: one copy that nobody waits for."""
    width = -(-max(map(len, rows)) // _ALIGN) * _ALIGN
    host = torch.zeros(len(rows), width, dtype=torch.int32, pin_memory=device.type == "cuda")
    for i, row in enumerate(rows):
        host[i, : len(row)] = torch.from_numpy(row.astype(np.int32))
    moved = host.to(device, non_blocking=True)
    return [moved[i, : len(row)] for i, row in enumerate(rows)]


def _sizes(store: SceneGraphBatch, ids: np.ndarray, bucket: tuple[int, int] | None) -> np.ndarray:
    """[G, 2] objects and relations of the batch's graphs, the padding graph last if there is one."""
    sizes = store.sizes[ids]
    if bucket is not None:
        num_n, num_e = sizes.sum(axis=0)
        pad_n, pad_e = bucket[0] - num_n, bucket[1] - num_e
        if pad_n < 0 or pad_e < 0 or (pad_n == 0 and pad_e > 0):
            raise ValueError(
                f"pack: a bucket of {bucket[0]} objects and {bucket[1]} relations is too small: the graphs have "
                f"{num_n} and {num_e}, and relations of padding need an object of padding"
            )
        sizes = np.concatenate([sizes, [[pad_n, pad_e]]])
    if sizes.sum(axis=0).max() >= MAX_ROWS:
        raise ValueError(f"pack: a batch must stay below {MAX_ROWS} objects and as many relations")
    return sizes


def _draw(
    store: SceneGraphBatch,
    graph_ids: Sequence[int] | np.ndarray,
    mask: MaskDraw | None,
    bucket: tuple[int, int] | None,
) -> tuple[SceneGraphBatch, torch.Tensor]:
    """Both public forms."""
    ids = np.asarray(graph_ids, dtype=np.int64)
    if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= store.num_graphs:
        raise ValueError(f"pack: graph ids must lie in 0..{store.num_graphs - 1} and there must be at least one")
    sizes, device = _sizes(store, ids, bucket), store.object_name.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("pack: the graphs drawn would be baked into the capture; capture sgg_kernels.pack.pack_fwd")
    offsets = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(axis=0)])
    first_copy, ratio_ppm, seed, step = 0, 0, 0, None
    if mask is not None:
        first_copy, ratio_ppm, seed, step = mask.first_copy, round(mask.ratio * PPM), mask.seed, mask.step
    host_step = np.array([step if isinstance(step, int) else 0])
    ids_B, object_ptr, relation_ptr, device_step = _ship([ids, offsets[:, 0], offsets[:, 1], host_step], device)
    *fields, masked_N = _pack(
        [getattr(store, name) for name in STORE_FIELDS],
        ids_B,
        object_ptr,
        relation_ptr,
        device_step if isinstance(step, int) else step,
        int(offsets[-1, 0]),
        int(offsets[-1, 1]),
        first_copy,
        ratio_ppm,
        seed,
        backend_for(device),
    )
    named = dict(zip(BATCH_FIELDS, fields, strict=True))
    return SceneGraphBatch(**named, object_ptr=object_ptr, relation_ptr=relation_ptr, sizes=sizes), masked_N


def pack(
    store: SceneGraphBatch, graph_ids: Sequence[int] | np.ndarray, *, bucket: tuple[int, int] | None = None
) -> SceneGraphBatch:
    """The graphs `graph_ids` ([B] host integers, repeats allowed) of `store`, end to end, on the store's device.

    bucket: (N, E) that the batch is padded to by one more graph, number B, so that nothing of the others reads the
    padding. Its names are the reserved ones, it stays out of the pools, and its relations spread evenly over its
    objects, each from an object to itself. It may be empty. Nothing is read back: sizes are the host's.
    Raises ValueError for an empty list, an id out of range, a bucket that is too small (relations of padding need an
    object of padding), or a batch beyond MAX_ROWS.

    Equivalent PyTorch: `SceneGraphBatch.from_graphs([graphs[i] for i in graph_ids], table)`
    """
    return _draw(store, graph_ids, None, bucket)[0]


def pack_masked(
    store: SceneGraphBatch,
    graph_ids: Sequence[int] | np.ndarray,
    mask: MaskDraw,
    *,
    bucket: tuple[int, int] | None = None,
) -> tuple[SceneGraphBatch, torch.Tensor]:
    """`pack`, and the objects that the auto-encoder hides: ([N] bool), in the same launch.

    In each graph from `mask.first_copy` on, `round(mask.ratio * objects)` of the objects, at least one masked and one
    kept; never the image node, and nothing of a graph of one object or of the padding. The same graph at the same
    step gets the same mask wherever it stands.
    Raises ValueError as `pack` does, and for a ratio outside 0..1.

    Equivalent PyTorch: `hash(seed, step, graph id, index)` ranked within each graph, the lowest masked
    """
    return _draw(store, graph_ids, mask, bucket)
