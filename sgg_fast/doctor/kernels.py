"""Compares every kernel with its reference on the device: outputs and gradients, in fp32 and in a narrow type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sgg_fast import ops
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import STATES

Tensors = dict[str, torch.Tensor]
Call = Callable[[SceneGraphBatch, Tensors], Any]

WIDTH = 96
"""Not a power of two."""
FLOOR = 1e-4
"""Allowed error relative to the largest value if the narrow reference happens to be exact."""


def graphs() -> SceneGraphBatch:
    """Ordinary graphs, one without relations, and a hub."""
    names = ("sheep", "grass", "sky", "house", "tree", "hat", "boat")
    hub = SceneGraph(names, tuple((0, "near", k) for k in range(1, len(names))))
    chain = SceneGraph(names[:4], ((0, "on", 1), (1, "under", 2), (3, "left of", 0)))
    return SceneGraphBatch.from_graphs([hub, SceneGraph(names[:2]), chain, hub], NameTable())


def calls() -> dict[str, tuple[Call, Callable[[SceneGraphBatch], dict[str, tuple[int, ...]]]]]:
    """Operator -> its call on a batch, and the shapes of its values."""
    d = WIDTH
    return {
        "gather_add_relu": (
            lambda b, t: ops.gather_add_relu(t["ac"], t["b"], t["bias"], b),
            lambda b: {"ac": (b.num_objects, 2 * d), "b": (b.num_relations, d), "bias": (d,)},
        ),
        "scatter_mean": (
            lambda b, t: ops.scatter_mean(t["y"], t["bias"], b, t["r"]),
            lambda b: {"y": (b.num_relations, 3 * d), "bias": (3 * d,), "r": (b.num_relations, d)},
        ),
        "masked_pool": (
            lambda b, t: ops.masked_pool(t["x"], t["r"], b),
            lambda b: {"x": (b.num_objects, d), "r": (b.num_relations, d)},
        ),
        "triple_context": (
            lambda b, t: ops.triple_context(t["s"], t["r"], t["o"], t["pool"], t["bias"], b),
            lambda b: {"s": (b.num_objects, d), "r": (b.num_relations, d), "o": (b.num_objects, d),
                       "pool": (b.num_graphs, d), "bias": (d,)},
        ),
        "graph_mean": (
            lambda b, t: ops.graph_mean(t["rows"], b.relation_ptr, b.relation_graph),
            lambda b: {"rows": (b.num_relations, d)},
        ),
        "group_norm_silu": (
            lambda b, t: ops.group_norm_silu(t["x"].to(memory_format=torch.channels_last), t["w"], t["bias"], 8, 1e-5),
            lambda b: {"x": (2, d, 16, 12), "w": (d,), "bias": (d,)},
        ),
        "add_layer_norm": (
            lambda b, t: ops.add_layer_norm(t["x"], t["w"], t["bias"], 1e-5, t["residual"], t["late"]),
            lambda b: {"x": (50, d), "w": (d,), "bias": (d,), "residual": (50, d), "late": (d,)},
        ),
        "geglu": (lambda b, t: ops.geglu(t["x"]), lambda b: {"x": (50, 2 * d)}),
    }  # fmt: skip


def _results(call: Call, batch: SceneGraphBatch, values: Tensors, dtype: torch.dtype, form: str) -> list[torch.Tensor]:
    """Outputs, then gradients, in fp32."""
    with ops.assumed(form):
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        out = call(batch, leaves)
        outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        arriving = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), arriving)
    return [x.detach().float() for x in (*outputs, *grads)]


def agrees(found: torch.Tensor, narrow: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether the error of `found` is at most twice the reference's error in the same type, plus a floor."""
    allowed = 2 * (narrow - exact).abs().max() + FLOOR * exact.abs().max()
    return bool((found - exact).abs().max() <= allowed)


def _judge(call: Call, batch: SceneGraphBatch, values: Tensors, dtypes: tuple[torch.dtype, ...]) -> str:
    """The fault, or ""."""
    exact = _results(call, batch, values, torch.float32, "reference")
    for dtype in dtypes:
        narrow = _results(call, batch, values, dtype, "reference")
        found = _results(call, batch, values, dtype, "triton")
        for number, (a, b, c) in enumerate(zip(found, narrow, exact, strict=True)):
            if not agrees(a, b, c):
                return f"tensor {number} in {dtype} differs from the reference".replace("torch.", "")
    return ""


def _adam(device: torch.device) -> str:
    """Check the flat optimiser, with every state: one step by either form."""
    weights = {}
    for form in ("reference", "triton"):
        with ops.assumed(form):
            generator = torch.Generator().manual_seed(1)
            shapes = {"adam8bit": (5000,), "adam": (300,), "adam4bit": (3000,), "adafactor": (50, 72)}
            parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes.values()]
            groups = [{"params": [p], "lr": 1e-2, "name": name, **STATES[name]}
                      for p, name in zip(parameters, shapes, strict=True)]  # fmt: skip
            optimizer = FlatAdam(groups, 0, max_norm=1.0)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
            if not bool(optimizer.applied > 0):
                return f"{form}: a step with finite gradients was not applied"
            weights[form] = [p.detach().float() for p in parameters]
    pairs = zip(weights["triton"], weights["reference"], strict=True)
    return "" if all(agrees(a, b, b) for a, b in pairs) else "weights after a step differ from the reference"


def _pack(device: torch.device) -> str:
    """Check that batches are exactly those that the reference packs on the CPU."""
    made = {}
    for form, place in (("reference", torch.device("cpu")), ("triton", device)):
        with ops.assumed(form):
            batch, masked = ops.pack_masked(graphs().to(place), [2, 0, 3], ops.MaskDraw(1, 0.3, 0, 5), bucket=(40, 64))
            found = [batch.subject, batch.object, batch.message_slot, batch.object_name, masked]
            made[form] = [x.to(device) for x in found]
    same = all(bool((a == b).all()) for a, b in zip(made["triton"], made["reference"], strict=True))
    return "" if same else "the packed batch differs from the reference"


def check(device: torch.device) -> Iterator[Finding]:
    """A finding for each operator; a kernel that raises is a failure with its own message."""
    if obstacle := ops.dispatch.why_not_triton(device):
        yield Finding("kernels", UNKNOWN, obstacle)
        return
    half = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    interpreted = device.type != "cuda"  # the interpreter rounds bf16 differently
    dtypes = (torch.float32,) if interpreted else (torch.float32, half)
    batch, generator = graphs().to(device), torch.Generator().manual_seed(0)
    checks: dict[str, Callable[[], str]] = {"pack": lambda: _pack(device), "adam": lambda: _adam(device)}
    for name, (call, shapes) in calls().items():
        drawn = {key: torch.randn(shape, generator=generator).to(device) for key, shape in shapes(batch).items()}
        checks[name] = functools.partial(_judge, call, batch, drawn, dtypes)
    for name, run in checks.items():
        try:
            wrong = run()
        except Exception as error:  # border: an error of the compiler or the driver is the finding
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        verdict = FAILED if wrong else OK
        yield Finding(f"kernel {name}", verdict, wrong or "as the reference, forward and backward", "kernels")
