"""Measures one optimiser step for `benchmarks.optimiser`: each form is compared with Adam in float64, then timed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.counts import model
from benchmarks.counts.roofline import CHIPS
from benchmarks.harness import measure
from benchmarks.harness.output import OpRow, Output, UnavailableError, device_of, in_time
from sgg_fast import ops
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import STATES

LR, STEPS = 1e-3, 3
FLOOR = {"adam": 1e-5, "adam8bit": 2e-2, "adam4bit": 2e-2, "adafactor": 2e-2}
"""Relative error of the three updates that a form may have beside twice the reference's; codes differ at ties."""

BYTES = {
    "adam": {"fp32": 28},
    "adam8bit": {"fp32": 16, "split": 14, "bf16": 10},
    "adam4bit": {"fp32": 14, "split": 12, "bf16": 8},
    "adafactor": {"fp32": 12, "split": 10, "bf16": 6},
}
"""Compulsory bytes of an element, by op and weights: gradient, weight and moments read, all but the first written.

`SCALES` come on top. The norm of the gradients reads them once more, and the means of adafactor's rows and of its
columns once each.
"""

SCALES = {"adam": 0.0, "adam8bit": 1 / 16, "adam4bit": 1 / 8, "adafactor": 0.0}
"""Bytes of an element: of each block and moment a scale in fp32, read and written."""

PASSES = {"adafactor": 3}
"""How often a step reads the gradients beside its update; once for the other ops."""

Shapes = list[tuple[int, ...]]


def _flat(op: str, weights: str, parameters: list[nn.Parameter]) -> FlatAdam:
    return FlatAdam([{"params": parameters, "lr": LR, **STATES[op]}], seed=0, split=weights == "split")


def _torch(**kind: bool) -> OptimiserForm:
    def build(op: str, weights: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        return torch.optim.Adam(parameters, LR, **kind) if (op, weights) == ("adam", "fp32") else None

    return build


def _packaged(module: str, **builds: Callable[..., torch.optim.Optimizer]) -> OptimiserForm:
    """A package's forms. builds: op -> from the module, the weights' form and the parameters."""

    def checked(op: str, weights: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        if op not in builds or weights == "split":
            return None
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"not installed (pip install {package})")
        return builds[op](importlib.import_module(module), weights, parameters)

    return checked


def _matrices(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Convolutions as the matrices that ours factors; transformers' would factor each 3 x 3 kernel."""
    made = []
    for parameter in parameters:
        shape = parameter.shape if parameter.ndim < 2 else (parameter.shape[0], -1)
        made.append(nn.Parameter(parameter.detach().reshape(shape)))
        made[-1].grad = None if parameter.grad is None else parameter.grad.reshape(shape)
    return made


def _of_torchao(name: str) -> Callable[..., torch.optim.Optimizer]:
    return lambda optim, weights, p: getattr(optim, name)(p, LR, bf16_stochastic_round=weights == "bf16")


_BITSANDBYTES = _packaged("bitsandbytes.optim", adam8bit=lambda optim, _, p: optim.Adam8bit(p, LR, min_8bit_size=0))
OptimiserForm = Callable[[str, str, list[nn.Parameter]], torch.optim.Optimizer | None]
FORMS: dict[str, OptimiserForm] = {
    "ours": _flat,
    "reference": _flat,
    "foreach": _torch(foreach=True),
    "fused": _torch(fused=True),
    "bitsandbytes": _BITSANDBYTES,
    "torchao": _packaged("torchao.optim", adam8bit=_of_torchao("Adam8bit"), adam4bit=_of_torchao("Adam4bit")),
    "transformers": _packaged(
        "transformers.optimization",
        adafactor=lambda optim, _, p: optim.Adafactor(_matrices(p), LR, relative_step=False, scale_parameter=False),
    ),
    "bitsandbytes-flat": _BITSANDBYTES,
}
"""(op, form of the weights, parameters) -> the optimiser, None if it does not exist. Raises `UnavailableError`.

`bitsandbytes-flat` is on one parameter of as many elements, as if all weights were padded into one buffer.
"""


@functools.cache
def shapes(size: str) -> Shapes:
    """The weights of a size."""
    if size == "tiny":
        return [(64, 32, 3, 3), (320,), (77, 130)]
    if size == "graph":
        return [(1536, 512), (1536, 512), (512,), (512, 512)] * 12
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    return [tuple(p.shape) for p in unet.parameters()]


def parameters(sizes: Shapes, dtype: torch.dtype, device: torch.device, flat: bool) -> list[nn.Parameter]:
    """Random weights with random gradients. flat: all in one parameter."""
    if flat:
        sizes = [(sum(torch.Size(s).numel() for s in sizes),)]
    generator, made = torch.Generator(device).manual_seed(0), []
    for shape in sizes:
        parameter = nn.Parameter(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype))
        parameter.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3).to(dtype)
        made.append(parameter)
    return made


def built(name: str, op: str, weights: str, sizes: Shapes, device: torch.device) -> torch.optim.Optimizer | None:
    """A form on parameters of its own; None if there is no such form. Raises UnavailableError."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    return FORMS[name](op, weights, parameters(sizes, dtype, device, name.endswith("-flat")))


def _adafactor_update(grad: torch.Tensor) -> torch.Tensor:
    """Adafactor's update over LR for a gradient that stays the same, whose means are then its own."""
    if grad.ndim < 2:
        return grad.sign()
    rows = grad.flatten(1).square()
    v = rows.mean(1, keepdim=True) * rows.mean(0) / rows.mean()
    update = grad.flatten(1) / v.sqrt()
    return (update / update.square().mean().sqrt().clamp(min=1)).view_as(grad)


def update_error(name: str, op: str, weights: str, device: torch.device) -> float | None:
    """Relative L2 error of three updates of the small set against float64; None if there is no such form."""
    optimizer = built(name, op, weights, shapes("tiny"), device)
    if optimizer is None:
        return None
    found = [p for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().double() for p in found]
    true = [nn.Parameter(p.clone()) for p in start]
    for parameter, other in zip(true, found, strict=True):
        parameter.grad = other.grad.double()
    exact = torch.optim.Adam(true, LR)
    for _ in range(STEPS):
        if op == "adafactor":
            for parameter in true:
                parameter.data -= LR * _adafactor_update(parameter.grad)
        else:
            exact.step()
        optimizer.step()
    pairs = [(p.detach().double() - s, t.detach() - s) for p, s, t in zip(found, start, true, strict=True)]
    off = sum((a - b).square().sum() for a, b in pairs).sqrt()
    return float(off / sum(b.square().sum() for _, b in pairs).sqrt())


def judged(name: str, op: str, weights: str, device: torch.device) -> tuple[str, float] | None:
    """(reason for no number or "", its error)."""
    ops.use_kernels("reference")
    allowed = 2 * (update_error("reference", op, weights, device) or 0.0) + FLOOR[op]
    ops.use_kernels("triton" if name == "ours" else "reference")
    error = update_error(name, op, weights, device)
    if error is None:
        return None
    return ("" if error <= allowed else f"mismatch: relative error {error:.2e}, {allowed:.2e} allowed"), error


def rows(op: str, weights: str, size: str, name: str, device: torch.device, seconds: float) -> Iterator[OpRow]:
    """One form's rows: calls, and captured in a CUDA graph if possible."""
    sizes = shapes(size)
    num = sum(torch.Size(s).numel() for s in sizes)
    facts = dataclasses.asdict(measure.machine(device))
    row = OpRow(op, "step", size, f"P={num} in {len(sizes)}", weights, name, "eager", "warm", **facts)
    try:
        verdict = judged(name, op, weights, device)
    except UnavailableError as error:
        yield dataclasses.replace(row, status=str(error))
        return
    if verdict is None:
        return
    row.status, row.error = verdict[0] or "ok", verdict[1]
    if verdict[0]:
        yield row
        return
    optimizer = built(name, op, weights, sizes, device)
    assert optimizer is not None
    num_bytes, copy = num * BYTES[op][weights], measure.copy_bandwidth(device)
    if chip := model.chip_of(row.device):
        row.least_ms = 1e3 * num_bytes / chip.bytes_per_second
    row.set_rate(measure.call_times(optimizer.step, device, seconds), num_bytes, copy)
    if device.type == "cuda":
        row.launches = measure.launches(optimizer.step, device)
        row.peak_bytes = measure.peak_bytes(optimizer.step, device)
    yield row
    if device.type == "cuda" and isinstance(optimizer, FlatAdam):
        gradients, stream = optimizer.gradients(), torch.cuda.Stream(device)
        table = optimizer.table(gradients).to(device)
        replay = measure.Replay(lambda: optimizer.launch(gradients, table), device, stream)
        row = dataclasses.replace(row, call="replay")
        row.set_rate(replay.times(seconds, flushed=False), num_bytes, copy)
        yield row


def run(args: argparse.Namespace) -> int:
    """The command; returns exit status 1 if one of our forms is wrong."""
    deadline, device = time.perf_counter() + args.limit, device_of(args)
    on_cuda = device.type == "cuda"
    if not on_cuda:
        print("CPU rows: the reference and the baselines. They say nothing about a GPU.")
    output = Output(args.out, "bench.csv", OpRow, append=True)
    names = [name for name in args.backend if (name == "ours") == on_cuda or name not in ("ours", "reference")]
    sizes = args.size or (["unet"] if on_cuda else ["graph"])
    steps = [(size, op, weights) for size in sizes for op, forms in BYTES.items() for weights in forms]
    for size, op, weights in in_time(steps, deadline):
        num, each = sum(torch.Size(s).numel() for s in shapes(size)), BYTES[op][weights]
        floors = ", ".join(f"{chip.name} {1e3 * num * each / chip.bytes_per_second:.2f} ms" for chip in CHIPS)
        print(f"{op} {size} {weights}: {each} bytes an element; PREDICTION of the least time: {floors}")
        try:
            for name in names:
                for row in rows(op, weights, size, name, device, args.seconds):
                    output.add(row)
        finally:
            ops.use_kernels("auto")
    return int(any(row.backend in ("ours", "reference") and row.status != "ok" for row in output.rows))
