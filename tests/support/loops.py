"""The equations of SGG-IG written out as loops over objects, relations and graphs, in float64.

An independent account: nothing here calls `sgg_fast.ops`, the reference kernels or a model's forward. It reads
weights by name from a state dict and follows the paper's equations. Random numbers are recomputed with
Python integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import torch
from torch import nn

from sgg_fast.graph import SceneGraph
from support.graphs import nodes, triples

Weights = Mapping[str, torch.Tensor]
Vectors = list[torch.Tensor]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers in float64."""
    return {name: value.detach().double() for name, value in module.state_dict().items()}


def under(w: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """The entries of `w` whose names begin with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in w.items() if name.startswith(f"{prefix}.")}


def jitter(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter off its initial value, so that no bias is 0 and no gain is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def split(values: torch.Tensor, sizes: list[int]) -> Vectors:
    """Packed rows, graph by graph."""
    return list(values.split(sizes))


def assert_rows(found: torch.Tensor, expected: Vectors) -> None:
    """fp32 rows agree with float64 ones to fp32's accuracy through a few layers."""
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.sum() / len(x)
    scale = ((centred**2).sum() / len(x) + 1e-5).sqrt()
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))


def mean(vectors: Vectors, width: int) -> torch.Tensor:
    """Mean of some vectors, 0 of none."""
    total = torch.zeros(width, dtype=torch.float64)
    for vector in vectors:
        total = total + vector
    return total / max(len(vectors), 1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt()))


def triple_conv(
    w: Weights, x: Vectors, r: Vectors, ends: list[tuple[int, int]], residual: bool
) -> tuple[Vectors, Vectors]:
    """Eqs 3-6 on one graph: concatenated triples through W1 and W2, then the mean of every object's messages."""
    width, x_in, r_in = len(w["bias"]), x, r
    if residual:
        x_in = [layer_norm(w, "object_norm", v) for v in x]
        r_in = [layer_norm(w, "relation_norm", v) for v in r]
    w_s, w_o = w["object_weight"][:width], w["object_weight"][width:]
    w_1 = torch.cat([w_s, w["relation_weight"], w_o], dim=1)
    inbox: list[Vectors] = [[] for _ in x]
    r_new = []
    for (s, o), r_e in zip(ends, r_in, strict=True):
        h = relu(w_1 @ torch.cat([x_in[s], r_e, x_in[o]]) + w["bias"])
        y = relu(linear(w, "second", h))
        inbox[s].append(y[:width])
        inbox[o].append(y[2 * width :])
        r_new.append(y[width : 2 * width])
    x_new = []
    for messages in inbox:
        update = linear(w, "update.2", relu(linear(w, "update.0", mean(messages, width))))
        x_new.append(update if residual else relu(update))
    if residual:
        x_new = [a + b for a, b in zip(x, x_new, strict=True)]
        r_new = [a + b for a, b in zip(r, r_new, strict=True)]
    return x_new, r_new


def relation_encoder(
    w: Weights, graph: SceneGraph, names: Mapping[str, torch.Tensor], form: str, masked: Collection[int] = ()
) -> tuple[Vectors, Vectors]:
    """The stack of triple convolutions on one graph; objects in `masked` start as the learned [MASK]."""

    def start(name: str) -> torch.Tensor:
        return linear(w, "project", names[name]) if "project.weight" in w else names[name]

    x = [w["mask_token"] if i in masked else start(name) for i, name in enumerate(nodes(graph))]
    r = [start(predicate) for _, predicate, _ in triples(graph)]
    ends = [(s, o) for s, _, o in triples(graph)]
    num_layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for layer in range(num_layers):
        x, r = triple_conv(under(w, f"layers.{layer}"), x, r, ends, form == "residual")
    if form == "residual":
        x = [layer_norm(w, "object_norm", v) for v in x]
        r = [layer_norm(w, "relation_norm", v) for v in r]
    return x, r


@dataclasses.dataclass
class Encoded:
    """One graph through eqs 3-8."""

    x: Vectors
    r: Vectors
    tokens: Vectors
    x_global: torch.Tensor


def encode(
    w: Weights,
    graph: SceneGraph,
    names: Mapping[str, torch.Tensor],
    form: str = "residual",
    shared: bool = False,
    masked: Collection[int] = (),
    codes: Mapping[int, torch.Tensor] | None = None,
) -> Encoded:
    """Eqs 3-8 up to X_global on one graph, from a conditioner's weights and standardised name embeddings.

    codes: instance codes by object, which triples see but the pools do not.
    """
    x, r = relation_encoder(under(w, "relation_encoder"), graph, names, form, masked)
    width, num_real = len(x[0]), len(graph.relations)
    pool = torch.cat([mean(x[:-1], width), mean(r[:num_real], width)])  # without the image node and its relations
    tokens, told = [], list(x)
    for i, code in (codes or {}).items():
        told[i] = x[i] + w["f_instance.weight"] @ code
    for (s, _, o), r_e in zip(triples(graph), r, strict=True):
        f_o = "f_subject" if shared else "f_object"
        x_rel = linear(w, "f_subject", told[s]) + linear(w, "f_relation", r_e) + linear(w, f_o, told[o]) + pool
        tokens.append(linear(w, "f_global.2", gelu(linear(w, "f_global.0", x_rel))))
    return Encoded(x, r, tokens, linear(w, "to_global", mean(tokens, len(tokens[0]))))


def context(w: Weights, encoded: Encoded, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 8's context of one graph: start | Linear(X_global) | triple tokens | padding; ([T, C], [T] bool)."""
    rows = [w["start_state"], layer_norm(w, "token_norm", linear(w, "from_global", encoded.x_global))]
    rows += [layer_norm(w, "token_norm", token) for token in encoded.tokens]
    used = len(rows)
    rows += [torch.zeros_like(rows[0])] * (length - used)
    return torch.stack(rows), torch.tensor([i < used for i in range(length)])


def attention(w: Weights, rows: Vectors, num_heads: int) -> Vectors:
    """Multi-head self-attention over the rows of one graph."""
    width = len(rows[0])
    head = width // num_heads
    qkv = [w["in_proj_weight"] @ row + w["in_proj_bias"] for row in rows]
    out = []
    for query in qkv:
        parts = []
        for k in range(num_heads):
            at = slice(k * head, (k + 1) * head)
            scores = [float((query[:width][at] * key[width : 2 * width][at]).sum()) / math.sqrt(head) for key in qkv]
            exps = [math.exp(s - max(scores)) for s in scores]
            parts.append(sum(e / sum(exps) * v[2 * width :][at] for e, v in zip(exps, qkv, strict=True)))
        out.append(linear(w, "out_proj", torch.cat(parts)))
    return out


def mae_decoder(w: Weights, x: Vectors, x_global: torch.Tensor, num_heads: int, num_layers: int = 2) -> Vectors:
    """The auto-encoder's decoder on one graph: a pre-norm transformer over [X_global, objects]."""
    rows = [linear(w, "global_in", x_global), *x]
    for i in range(num_layers):
        p = under(w, f"layers.{i}")
        attended = attention(under(p, "self_attn"), [layer_norm(p, "norm1", row) for row in rows], num_heads)
        rows = [a + b for a, b in zip(rows, attended, strict=True)]
        rows = [row + linear(p, "linear2", gelu(linear(p, "linear1", layer_norm(p, "norm2", row)))) for row in rows]
    return [linear(w, "out.1", layer_norm(w, "out.0", row)) for row in rows[1:]]


def hash_u32(*words: int) -> int:
    """MurmurHash3's finaliser chained over the words of the key, in Python integers."""
    h = 0
    for word in words:
        h = ((h ^ (word % 2**32)) + 0x9E3779B9) % 2**32
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        h ^= h >> 16
    return h


def uniform(*words: int) -> float:
    """In (0, 1): the middle of one of 2^24 cells."""
    return (hash_u32(*words) // 256 + 0.5) / 2**24


def normals(num: int, *words: int) -> torch.Tensor:
    """`num` standard normals by Box-Muller."""
    pairs = [(uniform(*words, 2 * i), uniform(*words, 2 * i + 1)) for i in range(num)]
    return torch.tensor([math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs])


def masked_objects(num: int, ratio: float, seed: int, step: int, sample: int, stream: int) -> set[int]:
    """The objects of a graph of `num` that the auto-encoder hides."""
    if num == 1:
        return set()
    count = min(max(math.floor(ratio * num + 0.5), 1), num - 1)
    ranked = sorted(range(num), key=lambda i: (hash_u32(seed, step, sample, stream, i), i))
    return set(ranked[:count])


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
