"""Draw a batch from the packed store of a whole data set. Letters: B graphs drawn, N objects, E relations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from sgg_kernels import reference
from sgg_kernels.reference.pack import BATCH_FIELDS, PPM, STORE_FIELDS, MaskKey, field_shapes, mask_counts

from sgg_fast.graph import SceneGraphBatch

from .dispatch import backend_for

MAX_ROWS = 2**28
"""Most objects or relations of a batch: sums and doubles of indices stay within int32."""

_ALIGN = 4
"""int32 words, 16 bytes: pointers have the same alignment in every batch, and kernels are compiled for alignment."""


@dataclasses.dataclass(frozen=True)
class MaskDraw:
    """Draw of the objects that the masked auto-encoder hides: a hash of (seed, step, graph id, object)."""

    first_copy: int
    """Index of the first masked copy in the batch; all later graphs are masked copies too."""
    ratio: float
    """Share of a copy's objects to hide, to six decimals; rounded to whole objects, halves up."""
    seed: int
    """Seed of the run; its low 32 bits count."""
    step: int | torch.Tensor
    """Step of the run. A device tensor ([1] int32) may change under a captured launch."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"pack: the mask ratio must lie between 0 and 1, not {self.ratio}")


def num_masked(store: SceneGraphBatch, graph_ids: np.ndarray, ratio: float) -> int:
    """Objects that a `MaskDraw` of this ratio masks in one copy of each of these graphs; the seed does not matter."""
    objects = torch.from_numpy(store.sizes[graph_ids, 0].astype(np.int64) - 1)
    return int(mask_counts(objects, round(ratio * PPM)).sum())


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
    """BATCH_FIELDS and the mask. store: STORE_FIELDS in order; other arguments as in `sgg_kernels.pack.pack_fwd`."""
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
    shapes = [*field_shapes(num_objects, num_relations).values(), (num_objects, torch.bool)]
    return [ids.new_empty(num, dtype=dtype) for num, dtype in shapes]


def table_shape(num_graphs: int, num_words: int = 1) -> tuple[int, int]:
    """Shape of the `draw_table` of a batch of `num_graphs` graphs, padding graph included.

    num_words: words in the last row. The step takes the first; the caller may use the others.
    """
    return 4, -(-max(num_graphs + 1, num_words) // _ALIGN) * _ALIGN


def draw_table(
    store: SceneGraphBatch,
    graph_ids: Sequence[int] | np.ndarray,
    step: int,
    *,
    bucket: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """(table, sizes) of a batch on the host. table: int32 [4, W], rows ids, object pointers, relation pointers, step.

    sizes: [G, 2] of its graphs, the padding graph last. Integers are wrapped to int32. out: a tensor of `table_shape`
    for the table, for example in pinned memory. Raises ValueError as `pack`.
    """
    ids = np.asarray(graph_ids, dtype=np.int64)
    if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= store.num_graphs:
        raise ValueError(f"pack: graph ids must lie in 0..{store.num_graphs - 1} and there must be at least one")
    sizes = _sizes(store, ids, bucket)
    table = torch.zeros(table_shape(len(sizes)), dtype=torch.int32) if out is None else out
    table[0, : len(ids)] = torch.from_numpy(ids.astype(np.int32))
    table[1:3, 0] = 0
    table[1:3, 1 : len(sizes) + 1] = torch.from_numpy(sizes.cumsum(axis=0).astype(np.int32).T)
    table[3, 0] = (step + 2**31) % 2**32 - 2**31
    return table, sizes


def _sizes(store: SceneGraphBatch, ids: np.ndarray, bucket: tuple[int, int] | None) -> np.ndarray:
    """[G, 2] objects and relations of the batch's graphs; a padding graph is the last."""
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


def _packed(
    store: SceneGraphBatch,
    table: torch.Tensor,
    num_ids: int,
    sizes: np.ndarray,
    totals: tuple[int, int],
    mask: MaskDraw | None,
) -> tuple[SceneGraphBatch, torch.Tensor]:
    """The batch of a table on the store's device; `totals` = (N, E)."""
    num_graphs, step = len(sizes), None if mask is None else mask.step
    object_ptr, relation_ptr = table[1, : num_graphs + 1], table[2, : num_graphs + 1]
    *fields, masked_N = _pack(
        [getattr(store, name) for name in STORE_FIELDS],
        table[0, :num_ids],
        object_ptr,
        relation_ptr,
        table[3, :1] if isinstance(step, int) else step,
        *totals,
        mask.first_copy if mask else 0,
        round(mask.ratio * PPM) if mask else 0,
        mask.seed if mask else 0,
        backend_for(store.object_name.device),
    )
    named = dict(zip(BATCH_FIELDS, fields, strict=True))
    return SceneGraphBatch(**named, object_ptr=object_ptr, relation_ptr=relation_ptr, sizes=sizes), masked_N


def pack_captured(
    store: SceneGraphBatch,
    table: torch.Tensor,
    num_ids: int,
    mask: MaskDraw | None,
    *,
    bucket: tuple[int, int],
    bounds: tuple[int, int],
) -> tuple[SceneGraphBatch, torch.Tensor]:
    """`pack_masked` or `pack` from a `draw_table` on the device; its content may change under a captured launch.

    The batch has `num_ids` graphs and the padding graph. The host does not know the sizes of the graphs here, so
    `sizes` holds upper bounds instead: `bounds` = (objects, relations) of one graph. An integer `mask.step` is not
    read: the table holds the step.

    Equivalent PyTorch: `pack_masked(store, table[0, :num_ids], mask, bucket=bucket)`
    """
    return _packed(store, table, num_ids, np.tile(bounds, (num_ids + 1, 1)), bucket, mask)


def pack(
    store: SceneGraphBatch, graph_ids: Sequence[int] | np.ndarray, *, bucket: tuple[int, int] | None = None
) -> SceneGraphBatch:
    """The graphs `graph_ids` ([B] host integers, repeats allowed) of `store` as one batch on the store's device.

    bucket: (N, E) to pad the batch to. The padding is one more graph, number B, so that no other graph reads it. It has
    the reserved names and stays out of the pools; its relations are spread evenly over its objects, each from an object
    to itself. It may be empty. Nothing is read back: the host knows all sizes.
    Raises ValueError for an empty list, an id out of range, a bucket that is too small (padding relations need a
    padding object), or a batch beyond MAX_ROWS.

    Equivalent PyTorch: `SceneGraphBatch.from_graphs([graphs[i] for i in graph_ids], table)`
    """
    return pack_masked(store, graph_ids, None, bucket=bucket)[0]


def pack_masked(
    store: SceneGraphBatch,
    graph_ids: Sequence[int] | np.ndarray,
    mask: MaskDraw | None,
    *,
    bucket: tuple[int, int] | None = None,
) -> tuple[SceneGraphBatch, torch.Tensor]:
    """`pack`, and the mask [N] bool of the auto-encoder from the same launch; all False without `mask`.

    Each graph from `mask.first_copy` on has `round(mask.ratio * objects)` masked objects, at least one masked and one
    kept. The image node, the padding and a graph of one object are never masked. The same graph at the same step gets
    the same mask at any position in the batch.
    Raises ValueError as `pack`, and for a ratio outside 0..1.

    Equivalent PyTorch: rank `hash(seed, step, graph id, index)` within each graph and mask the lowest
    """
    device = store.object_name.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("pack: the graphs drawn would be baked into the capture; capture pack_captured")
    step = mask.step if mask is not None and isinstance(mask.step, int) else 0
    table, sizes = draw_table(store, graph_ids, step, bucket=bucket)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    num_n, num_e = sizes.sum(axis=0).tolist()
    return _packed(store, table, len(graph_ids), sizes, (num_n, num_e), mask)
