"""Makes the inputs of the measured cases; inputs are made only here.

Not here: the list of cases (`cases.py`), a case's computation (`baselines.py`), its bytes (`counts/roofline.py`) or its
time (`harness/measure.py`).
Everything is a function of the seed. Letters: B images, N objects, E relations, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from sgg_kernels.reference.pack import STORE_FIELDS, MaskKey

from benchmarks.ops.cases import (
    CONTEXT_TOKENS,
    GRAPH_OPS,
    IMAGE_CHANNELS,
    IMAGE_OPS,
    IMAGE_SIZES,
    LATENT_CHANNELS,
    SIZES,
    WIDTH,
    Case,
)
from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch
from sgg_fast.nn.encoder import TripleConv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BUCKET = (128, 256)
"""(N, E) of the pre-training step at batch 2, full and masked copies, padded by one more graph."""

NUM_NAMES = 178 + 1 + 45 + 1
"""sg2im's vocabulary of Visual Genome with the two reserved names."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers in the byte formulas."""

    graphs: int
    objects: int
    relations: int
    pooled_objects: int
    """Objects that the masks admit to the pools."""
    pooled_relations: int
    width: int

    def __str__(self) -> str:
        return f"B={self.graphs} N={self.objects} E={self.relations} D={self.width}"

    @classmethod
    def of(cls, batch: SceneGraphBatch, width: int) -> Shape:
        """The numbers of a batch on the CPU."""
        pooled = int(batch.object_pooled.sum()), int(batch.relation_pooled.sum())
        return cls(batch.num_graphs, batch.num_objects, batch.num_relations, *pooled, width)


@dataclasses.dataclass(frozen=True)
class ImageShape:
    """The numbers in the byte formulas of image ops."""

    images: int
    pixels: int
    width: int
    """Columns of the output: channels, geglu's hidden width, or the latents' channels."""

    def __str__(self) -> str:
        return f"B={self.images} S={self.pixels} C={self.width}"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All inputs of the forms of one op."""

    batch: SceneGraphBatch
    tensors: dict[str, torch.Tensor]
    """Floating tensors by name; all of them require gradients."""
    index: dict[str, torch.Tensor]
    """Precomputed indices for the baselines, which correspond to our plan; made before timing.

    int64: `subject`, `object`, `receiver` (both, [2E]), `object_graph`, `relation_graph`, and `object_bin`,
    `relation_bin`, in which masked rows go to one extra bin. fp32 [rows, 1], one over a row's number of summands (1 for
    none): `receiver_share`, `object_bin_share`, `relation_bin_share`, `relation_graph_share`. hash_draw's key: `sample`
    int64 [B], `step` int32 [1]. cross_attention's fp32 `context_bias` [B, T].
    """
    bias: torch.Tensor
    """Zeros for our ops. In the other forms a linear layer adds its bias and sums its gradient; our op does both
    itself. In the layer's row both sides include it."""
    shape: Shape | ImageShape
    draw: Draw | None = None
    """`pack` only."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """The inputs of `pack`: a store of graphs and the draw of one batch, as `sgg_kernels.pack.pack_fwd` takes it."""

    store: dict[str, torch.Tensor]
    ids: torch.Tensor
    object_ptr: torch.Tensor
    relation_ptr: torch.Tensor
    mask: MaskKey
    """The second half of the batch are the masked copies, with 30 % of their objects masked."""


def sizes_like_visual_genome(num_graphs: int, rng: np.random.Generator) -> np.ndarray:
    """[B, 2] objects and relations of graphs after sg2im's filters, without image node and relations.

    3-30 objects with mean 10, 1-30 relations with mean 5.5 (Johnson et al., 2018, section 4: on average ten objects and
    five relationships an image); images with more objects have more relations. Gamma-Poisson mixtures: long right
    tails.
    """
    num_objects = 3 + np.minimum(rng.poisson(rng.gamma(2.0, 3.52, num_graphs)), 27)
    busy = rng.gamma(2.0, 0.226, num_graphs) * num_objects
    return np.stack([num_objects, 1 + np.minimum(rng.poisson(busy), 29)], axis=1)


def _endpoints(size_of: np.ndarray, power: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distinct subject and object index within graphs of `size_of` objects, [E]; a few objects are hubs.

    Index floor(n u^power): the first object gets a share n^(-1/power). In the raw Visual Genome sample the
    busiest object holds 12-24 % of the endpoints of 24-52 objects; power 2 gives 14-20 %.
    """
    subject = (size_of * rng.random(len(size_of)) ** power).astype(np.int64)
    shift = 1 + ((size_of - 1) * rng.random(len(size_of)) ** power).astype(np.int64)
    # Half the relations point at the hub's neighbourhood from any object, half start there.
    other = (subject + shift) % size_of
    flip = rng.random(len(size_of)) < 0.5
    return np.where(flip, other, subject), np.where(flip, subject, other)


def _packed(sizes: np.ndarray, power: float, rng: np.random.Generator) -> SceneGraphBatch:
    """Graphs of `sizes` objects and relations, [B, 2], packed with image nodes and relations, names drawn."""
    num_objects, num_real = sizes[:, 0], sizes[:, 1]
    full = np.stack([num_objects + 1, num_real + num_objects], axis=1)
    first_object, first_relation = (np.concatenate([[0], np.cumsum(full[:, k])[:-1]]) for k in (0, 1))
    total_objects, total_relations = full.sum(0)
    graph = np.repeat(np.arange(len(sizes)), full[:, 1])
    within = np.arange(total_relations) - first_relation[graph]
    is_real = within < num_real[graph]
    subject = first_object[graph] + within - num_real[graph]
    object_ = first_object[graph] + num_objects[graph]
    real = graph[is_real]
    s, o = _endpoints(num_objects[real], power, rng)
    subject[is_real], object_[is_real] = first_object[real] + s, first_object[real] + o
    names = rng.integers(2, NUM_NAMES, total_objects)
    names[first_object + num_objects] = 0
    predicates = np.where(is_real, rng.integers(2, NUM_NAMES, total_relations), 1)
    return SceneGraphBatch.from_arrays(names, predicates, subject, object_, full)


@functools.cache
def graphs(size: str, seed: int = 0) -> SceneGraphBatch:
    """The packed graphs of a size, on the CPU. Raises KeyError for an unknown name.

    At scale: E relations in total over N = E / 4 objects in 64 graphs, with power-law hubs; each image node is also a
    hub.
    """
    num_graphs, num_relations = SIZES[size]
    rng = np.random.default_rng([seed, list(SIZES).index(size)])
    if num_relations:
        num_objects = num_relations // 4 // num_graphs - 1
        sizes = np.full((num_graphs, 2), (num_objects, num_relations // num_graphs - num_objects))
        sizes[: num_relations % num_graphs, 1] += 1
        return _packed(sizes, 3.0, rng)
    batch = _packed(sizes_like_visual_genome(num_graphs, rng), 2.0, rng)
    return ops.pack(batch, [0, 1, 0, 1], bucket=BUCKET) if size == "paper" else batch  # full and masked copies


def draw(size: str, device: torch.device, seed: int = 0) -> tuple[Draw, Shape]:
    """A store of Visual-Genome-like graphs and one batch of it; at scale, with enough graphs for the relations."""
    num_graphs, num_relations = SIZES[size]
    num_graphs = round(num_relations / 15.5) if num_relations else num_graphs
    rng = np.random.default_rng([seed, 77])
    store = _packed(sizes_like_visual_genome(max(1024, num_graphs), rng), 2.0, rng)
    ids = rng.permutation(store.num_graphs)[:num_graphs]
    if size == "paper":
        ids = np.concatenate([ids, ids])
    sizes = store.sizes[ids]
    if size == "paper":
        sizes = np.concatenate([sizes, [BUCKET - sizes.sum(0)]])
    ptrs = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(0)]).astype(np.int32)
    fields = {name: getattr(store, name).to(device) for name in STORE_FIELDS}
    index = [torch.from_numpy(a.copy()).to(device) for a in (ids.astype(np.int32), ptrs[:, 0], ptrs[:, 1])]
    mask = MaskKey(len(ids) // 2, 300_000, seed, torch.ones(1, dtype=torch.int32, device=device))
    num_objects, num_relations = (int(n) for n in ptrs[-1])
    return Draw(fields, *index, mask), Shape(len(sizes), num_objects, num_relations, num_objects, num_relations, 0)


def _shapes(op: str, shape: Shape | ImageShape) -> dict[str, tuple[int, ...]]:
    """Floating inputs of an op by name, without the layer's weights."""
    if isinstance(shape, ImageShape):
        norm = {"x": (shape.images, shape.pixels, shape.width), "weight": (shape.width,), "bias": (shape.width,)}
        return {
            "geglu": {"x": (shape.images * shape.pixels, 2 * shape.width)},
            "group_norm_silu": norm,
            "group_norm_silu_shift": norm | {"shift": (shape.images, shape.width)},
            "hash_draw": {},
            "cross_attention": {
                "q": (shape.images, shape.pixels, shape.width),
                **dict.fromkeys(("k", "v"), (shape.images, CONTEXT_TOKENS, shape.width)),
            },
            "add_layer_norm": {
                **dict.fromkeys(("x", "residual"), (shape.images * shape.pixels, shape.width)),
                **dict.fromkeys(("late", "weight", "bias"), (shape.width,)),
            },
        }[op]
    n, e, d = shape.objects, shape.relations, shape.width
    return {
        "gather_add_relu": {"ac": (n, 2 * d), "b": (e, d)},
        "scatter_mean": {"y": (e, 3 * d)},
        "masked_pool": {"x": (n, d), "r": (e, d)},
        "triple_context": {"s": (n, 2 * d), "r": (e, 2 * d), "o": (n, 2 * d), "pool": (shape.graphs, 2 * d)},
        "graph_mean": {"rows": (e, d)},
        "layer": {"x": (n, d), "r": (e, d)},
        "pack": {},
    }[op]


_BIAS_COLUMNS = {"gather_add_relu": 1, "scatter_mean": 3, "triple_context": 2}


def _weights(width: int, like: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters of one plain triple convolution, with random biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = TripleConv(width, "plain")
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return {name: p.detach().to(**like) for name, p in module.named_parameters()}


def inputs(case: Case, device: torch.device | str, seed: int = 0, drawn: bool = True) -> Inputs:
    """Inputs of `case` on `device`, the same for the same seed and device kind.

    `meta` gives shapes only; so does `drawn=False` on a CPU, which never touches the memory.
    """
    device, made = torch.device(device), None
    batch = graphs(case.size if case.op in GRAPH_OPS and case.op != "pack" else "tiny", seed)
    shape: Shape | ImageShape = Shape.of(batch, case.width)
    if case.op in IMAGE_OPS:
        channels = IMAGE_CHANNELS if case.width == WIDTH else case.width
        width = {"geglu": 4 * channels, "hash_draw": LATENT_CHANNELS}.get(case.op, channels)
        shape = ImageShape(*IMAGE_SIZES[case.size], width)
    elif case.op == "pack":
        made, shape = draw(case.size, device, seed)
    batch = batch.to(device)
    like = {"device": device, "dtype": DTYPES.get(case.dtype, torch.float32)}
    drawn = drawn and device.type != "meta"
    generator = torch.Generator(device).manual_seed(seed) if drawn else None
    tensors = {
        name: torch.randn(size, generator=generator, **like) if drawn else torch.empty(size, **like)
        for name, size in _shapes(case.op, shape).items()
    }
    if drawn and case.op == "gather_add_relu":
        # On a grid of 1/64 with absolute values up to 4 sums are exact in fp32 and fp16: rounding flips no relu unit.
        tensors = {name: t.mul_(64).round_().clamp_(-256, 256).div_(64) for name, t in tensors.items()}
    if case.op == "layer":
        tensors |= _weights(case.width, like)
    subject, object_ = batch.subject.long(), batch.object.long()
    index = {
        "subject": subject,
        "object": object_,
        "receiver": torch.cat([subject, object_]),
        "object_graph": batch.object_graph.long(),
        "relation_graph": batch.relation_graph.long(),
    }
    num_bins = batch.num_graphs + 1
    index["object_bin"] = index["object_graph"].where(batch.object_pooled != 0, num_bins - 1)
    index["relation_bin"] = index["relation_graph"].where(batch.relation_pooled != 0, num_bins - 1)
    if case.op == "cross_attention":
        assert isinstance(shape, ImageShape)
        bias = torch.zeros(shape.images, CONTEXT_TOKENS, device=subject.device)
        bias[:, CONTEXT_TOKENS * 3 // 4 :] = float("-inf")  # padded tokens
        index["context_bias"] = bias
    if case.op == "hash_draw":
        assert isinstance(shape, ImageShape)
        index["sample"] = torch.arange(shape.images, device=subject.device) + 10_000 * seed
        index["step"] = torch.full((1,), 7, dtype=torch.int32, device=subject.device)
    ends = {"receiver": batch.num_objects, "object_bin": num_bins, "relation_bin": num_bins,
            "relation_graph": batch.num_graphs}  # fmt: skip
    for name, num in ends.items():
        ones = torch.ones(len(index[name]), device=subject.device)
        count = torch.zeros(num, device=subject.device).index_add(0, index[name], ones)
        index[f"{name}_share"] = 1 / count.clamp(min=1)[:, None]
    bias = torch.zeros(_BIAS_COLUMNS.get(case.op, 0) * case.width, **like)
    return Inputs(batch, tensors, index, bias, shape, made)


def upstream(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, number: int, seed: int = 0
) -> torch.Tensor:
    """The incoming gradient of output `number`: normal numbers, the same for every form of a case."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1000 * seed + number + 1)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
