"""The compared forms of each op: ours, the reference, and common implementations.

`ours` are the public ops on Triton. `eager` is plain torch in the input's dtype, with indices prepared and shapes
static, so `compile` (the same function through torch.compile) can be captured too. `pyg` is
`torch_geometric.utils.scatter`. `sg2im` is the published formulation of Johnson et al. (2018): gather, concatenate, one
linear map, split, add up by subject and by object, divide by counts. None of them is the definition:
`sgg_kernels.reference` is, and it decides whether a form's numbers are shown.

A form takes (Inputs, tensors by name) and returns a tuple of tensors. Letters: B images, N objects, E relations, D
width.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import reference
from torch.func import functional_call

from benchmarks.harness.output import UnavailableError
from benchmarks.ops.cases import HEADS
from benchmarks.ops.registry import Inputs
from sgg_fast import ops
from sgg_fast.nn.encoder import TripleConv

Tensors = dict[str, torch.Tensor]
OpForm = Callable[[Inputs, Tensors], tuple[torch.Tensor, ...]]

FORMS: dict[tuple[str, str], OpForm] = {}

READ_BACK = {("pack", "reference")}
"""Forms that read sizes back to the host, so they cannot be captured."""


def _form(op: str, backend: str) -> Callable[[OpForm], OpForm]:
    def register(function: OpForm) -> OpForm:
        FORMS[op, backend] = function
        return function

    return register


def pyg_scatter() -> Callable[..., torch.Tensor]:
    """`torch_geometric.utils.scatter`. Raises UnavailableError if the package is missing."""
    if importlib.util.find_spec("torch_geometric") is None:
        raise UnavailableError("not installed (pip install torch_geometric)")
    from torch_geometric.utils import scatter

    return scatter


def _eager_mean(inputs: Inputs, rows: torch.Tensor, index: str) -> torch.Tensor:
    """Mean of the rows that `inputs.index[index]` sends to each bin."""
    share = inputs.index[f"{index}_share"]
    total = rows.new_zeros(len(share), rows.shape[1]).index_add(0, inputs.index[index], rows)
    return total * share.to(total.dtype)


@_form("gather_add_relu", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    a, c = t["ac"].chunk(2, dim=1)
    subject, object_ = inputs.index["subject"], inputs.index["object"]
    return ((a.index_select(0, subject) + t["b"] + c.index_select(0, object_)).relu(),)


@_form("gather_add_relu", "reference")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    (a, c), b = t["ac"].chunk(2, dim=1), inputs.batch
    return (reference.gather_add_relu(a, t["b"], c, t["b"].new_zeros(a.shape[1]), b.subject, b.object),)


@_form("gather_add_relu", "ours")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (ops.gather_add_relu(t["ac"], t["b"], inputs.bias, inputs.batch),)


@_form("scatter_mean", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    m_s, r, m_o = t["y"].relu().chunk(3, dim=1)
    return _eager_mean(inputs, torch.cat([m_s, m_o]), "receiver"), r


@_form("scatter_mean", "reference")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return reference.scatter_mean(t["y"], *inputs.batch.plan)


@_form("scatter_mean", "ours")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return ops.scatter_mean(t["y"], inputs.bias, inputs.batch)


@_form("scatter_mean", "pyg")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    m_s, r, m_o = t["y"].relu().chunk(3, dim=1)
    messages, num = torch.cat([m_s, m_o]), inputs.batch.num_objects
    return pyg_scatter()(messages, inputs.index["receiver"], dim=0, dim_size=num, reduce="mean"), r


def _sg2im_mean(inputs: Inputs, m_s: torch.Tensor, m_o: torch.Tensor) -> torch.Tensor:
    """Two scatter_adds of the messages and two of ones into zeros, then the division."""
    subject, object_ = inputs.index["subject"], inputs.index["object"]
    total = m_s.new_zeros(inputs.batch.num_objects, m_s.shape[1])
    total = total.scatter_add(0, subject[:, None].expand_as(m_s), m_s)
    total = total.scatter_add(0, object_[:, None].expand_as(m_o), m_o)
    ones, count = m_s.new_ones(len(subject)), m_s.new_zeros(len(total))
    count = count.scatter_add(0, subject, ones).scatter_add(0, object_, ones)
    return total / count.clamp(min=1)[:, None]


@_form("scatter_mean", "sg2im")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    y, width = t["y"].relu(), t["y"].shape[1] // 3
    m_s, r, m_o = y[:, :width], y[:, width : 2 * width], y[:, 2 * width :]
    return _sg2im_mean(inputs, m_s, m_o), r


@_form("masked_pool", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    means = (_eager_mean(inputs, t["x"], "object_bin"), _eager_mean(inputs, t["r"], "relation_bin"))
    pools = [mean[: inputs.batch.num_graphs] for mean in means]
    return (torch.cat(pools, dim=1),)


@_form("masked_pool", "reference")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    b = inputs.batch
    masks = b.object_pooled, b.relation_pooled
    return (reference.masked_pool(t["x"], t["r"], b.object_ptr, b.relation_ptr, *masks),)


@_form("masked_pool", "ours")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (ops.masked_pool(t["x"], t["r"], inputs.batch),)


@_form("masked_pool", "pyg")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    scatter, num = pyg_scatter(), inputs.batch.num_graphs
    pools = [
        scatter(rows, inputs.index[bins], dim=0, dim_size=num + 1, reduce="mean")[:num]
        for rows, bins in ((t["x"], "object_bin"), (t["r"], "relation_bin"))
    ]
    return (torch.cat(pools, dim=1),)


@_form("graph_mean", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (_eager_mean(inputs, t["rows"], "relation_graph"),)


@_form("graph_mean", "reference")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (reference.graph_mean(t["rows"], inputs.batch.relation_ptr),)


@_form("graph_mean", "ours")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (ops.graph_mean(t["rows"], inputs.batch.relation_ptr, inputs.batch.relation_graph),)


@_form("graph_mean", "pyg")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    index, num = inputs.index["relation_graph"], inputs.batch.num_graphs
    return (pyg_scatter()(t["rows"], index, dim=0, dim_size=num, reduce="mean"),)


@_form("triple_context", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    i = inputs.index
    s, o, pool = (
        t[name].index_select(0, i[at]) for name, at in (("s", "subject"), ("o", "object"), ("pool", "relation_graph"))
    )
    return (s + t["r"] + o + pool,)


@_form("triple_context", "reference")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    b = inputs.batch
    return (reference.triple_context(*t.values(), b.subject, b.object, b.relation_graph),)


@_form("triple_context", "ours")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (ops.triple_context(*t.values(), inputs.bias, inputs.batch),)


def _update(t: Tensors, mean: torch.Tensor) -> torch.Tensor:
    hidden = F.linear(mean, t["update.0.weight"], t["update.0.bias"]).relu()
    return F.linear(hidden, t["update.2.weight"], t["update.2.bias"]).relu()


@_form("layer", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    ac, b = F.linear(t["x"], t["object_weight"]), F.linear(t["r"], t["relation_weight"], t["bias"])
    (h,) = FORMS["gather_add_relu", "eager"](inputs, {"ac": ac, "b": b})
    y = F.linear(h, t["second.weight"], t["second.bias"])
    mean, r = FORMS["scatter_mean", "eager"](inputs, {"y": y})
    return _update(t, mean), r


@_form("layer", "sg2im")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    triples = torch.cat([t["x"][inputs.index["subject"]], t["r"], t["x"][inputs.index["object"]]], dim=1)
    ws, wo = t["object_weight"].chunk(2)
    h = F.linear(triples, torch.cat([ws, t["relation_weight"], wo], dim=1), t["bias"]).relu()
    y, width = F.linear(h, t["second.weight"], t["second.bias"]).relu(), t["r"].shape[1]
    return _update(t, _sg2im_mean(inputs, y[:, :width], y[:, 2 * width :])), y[:, width : 2 * width]


@functools.cache
def _module(width: int) -> TripleConv:
    return TripleConv(width, "plain")


def _layer(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The model's own module, on the current kernels of `sgg_fast.ops`."""
    weights = {name: tensor for name, tensor in t.items() if name not in ("x", "r")}
    return functional_call(_module(inputs.shape.width), weights, (t["x"], t["r"], inputs.batch))


FORMS["layer", "ours"] = FORMS["layer", "reference"] = _layer


NORM_EPS = 1e-5


def _norm(inputs: Inputs, x_BSC: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `norm` to the rows as channels-last images [B, C, h, w]; returns rows."""
    side = math.isqrt(inputs.shape.pixels)
    return norm(x_BSC.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


def _groups(inputs: Inputs) -> int:
    return math.gcd(32, inputs.shape.width)


@_form("group_norm_silu", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    groups = _groups(inputs)
    return (_norm(inputs, t["x"], lambda x: F.silu(F.group_norm(x, groups, t["weight"], t["bias"], NORM_EPS))),)


def _norm_ours(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The public op, on the current kernels of `sgg_fast.ops`."""
    groups = _groups(inputs)
    return (_norm(inputs, t["x"], lambda x: ops.group_norm_silu(x, t["weight"], t["bias"], groups, NORM_EPS)),)


FORMS["group_norm_silu", "ours"] = FORMS["group_norm_silu", "reference"] = _norm_ours


@_form("group_norm_silu_shift", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    moved = t["x"] + t["shift"][:, None]
    return FORMS["group_norm_silu", "eager"](inputs, {**t, "x": moved})


def _shifted_ours(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The public op with its shift, on the current kernels of `sgg_fast.ops`."""
    groups, w, b, shift = _groups(inputs), t["weight"], t["bias"], t["shift"]
    return (_norm(inputs, t["x"], lambda x: ops.group_norm_silu(x, w, b, groups, NORM_EPS, shift_BC=shift)),)


FORMS["group_norm_silu_shift", "ours"] = FORMS["group_norm_silu_shift", "reference"] = _shifted_ours


def _key(inputs: Inputs) -> tuple[int | torch.Tensor, ...]:
    """The key of a draw of noise: seed, step, sample, purpose."""
    return 9, inputs.index["step"], inputs.index["sample"], 12


def _num_normal(inputs: Inputs) -> tuple[int]:
    return (inputs.shape.pixels * inputs.shape.width,)


@_form("hash_draw", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    return (reference.hash_normal(_num_normal(inputs), *_key(inputs)),)


def _draw_ours(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The public op, on the current kernels of `sgg_fast.ops`."""
    return (ops.hash_normal(_num_normal(inputs), *_key(inputs)),)


FORMS["hash_draw", "ours"] = FORMS["hash_draw", "reference"] = _draw_ours


def exact_draw(inputs: Inputs) -> torch.Tensor:
    """hash_draw in float64: Box & Muller (1958) on the same uniform numbers."""
    columns = [word[:, None] if isinstance(word, torch.Tensor) else word for word in _key(inputs)]
    (num,) = _num_normal(inputs)
    index = torch.arange(2 * num, device=inputs.index["sample"].device)
    u = reference.hash_uniform(*columns, index).double()
    return torch.sqrt(-2 * torch.log(u[:, ::2])) * torch.cos(2 * torch.pi * u[:, 1::2])


@_form("add_layer_norm", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    total = t["x"] + t["late"] + t["residual"]
    return F.layer_norm(total, total.shape[-1:], t["weight"], t["bias"], NORM_EPS), total


def _add_layer_norm_ours(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The public op, on the current kernels of `sgg_fast.ops`."""
    return ops.add_layer_norm(t["x"], t["weight"], t["bias"], NORM_EPS, t["residual"], t["late"])


FORMS["add_layer_norm", "ours"] = FORMS["add_layer_norm", "reference"] = _add_layer_norm_ours


def _heads(t: Tensors) -> list[torch.Tensor]:
    """q, k, v as [B, rows, heads, width]."""
    return [x.unflatten(-1, (HEADS, -1)) for x in t.values()]


@_form("cross_attention", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    q, k, v = (x.transpose(1, 2) for x in _heads(t))
    mask = inputs.index["context_bias"][:, None, None].to(q.dtype)
    return (F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2),)


def _cross_ours(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The public op, on the current kernels of `sgg_fast.ops`; in fp32 it is the reference."""
    return (ops.cross_attention(*_heads(t), inputs.index["context_bias"]).flatten(2),)


FORMS["cross_attention", "ours"] = FORMS["cross_attention", "reference"] = _cross_ours


@_form("geglu", "eager")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    a, gate = t["x"].chunk(2, dim=-1)
    return (a * F.gelu(gate),)


def _gate_ours(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    """The public op, on the current kernels of `sgg_fast.ops`."""
    return (ops.geglu(t["x"]),)


FORMS["geglu", "ours"] = FORMS["geglu", "reference"] = _gate_ours


@_form("pack", "reference")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    d = inputs.draw
    out, masked = reference.pack(d.store, d.ids, d.object_ptr, d.relation_ptr, d.mask)
    return (*out.values(), masked)


@_form("pack", "ours")
def _(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
    from sgg_kernels.pack import pack_fwd

    d, shape = inputs.draw, inputs.shape
    out, masked = pack_fwd(d.store, d.ids, d.object_ptr, d.relation_ptr, shape.objects, shape.relations, d.mask)
    return (*out.values(), masked)


def form(op: str, backend: str) -> OpForm | None:
    """The form of `op` on `backend`; None if the backend has none. Raises UnavailableError if it cannot run here."""
    if backend == "compile":
        plain = FORMS.get((op, "eager"))
        torch._functorch.config.donated_buffer = False  # a backward that is timed alone runs many times
        return None if plain is None else torch.compile(plain, dynamic=False, fullgraph=True)
    if backend == "pyg" and (op, "pyg") in FORMS:
        pyg_scatter()
    plain = FORMS.get((op, backend))
    if backend not in ("ours", "reference") or plain is None:
        return plain

    def chosen(inputs: Inputs, t: Tensors) -> tuple[torch.Tensor, ...]:
        ops.use_kernels("triton" if backend == "ours" else "reference")
        try:
            return plain(inputs, t)
        finally:
            ops.use_kernels("auto")

    return chosen
