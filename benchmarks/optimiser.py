"""Times one optimiser step, gradients given: our flat kernels against torch's Adam, bitsandbytes' and torchao's.

    python -m benchmarks.optimiser                      # everything that runs here
    python -m benchmarks.optimiser --size unet --backend ours fused bitsandbytes-flat --out outputs/bench

`unet` are the 686 weights of Stable Diffusion v1's UNet, `graph` a graph encoder's. Before a form is timed, three of
its steps on the small set are compared with Adam in float64; a wrong form gets no number. Rows have the format of
`benchmarks.run`; CPU rows do not predict a GPU. Our kernels are timed only on CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.counts.roofline import CHIPS
from benchmarks.harness import measure
from benchmarks.harness.output import OpRow, Output, add_flags, file_in
from benchmarks.ops.baselines import UnavailableError
from sgg_fast import ops
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import ConfigError
from sgg_fast.train.optim.adam_flat import FlatAdam

LR, STEPS = 1e-3, 3
FLOOR = {"adam": 1e-5, "adam8bit": 2e-2}
"""Relative error of the three updates that a form may have beside twice the reference's; codes differ at ties."""

BYTES = {"adam": {"fp32": 28}, "adam8bit": {"fp32": 16, "split": 14, "bf16": 10}}
"""Compulsory bytes of an element, by op and weights: gradient, weight and moments read, all but the first written.

Scales add 1/16 (16 bytes for each block of 256, read and written). The norm of the gradients reads them once more.
"""

FORMS: dict[str, Callable[..., torch.optim.Optimizer]] = {}

Shapes = list[tuple[int, ...]]


def _form(name: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        FORMS[name] = function
        return function

    return register


def _package(name: str) -> None:
    """Raises UnavailableError if a package is missing."""
    if importlib.util.find_spec(name) is None:
        raise UnavailableError(f"not installed (pip install {name})")


def _flat(op: str, weights: str, parameters: list[nn.Parameter]) -> FlatAdam:
    group = {"params": parameters, "lr": LR, "optim_bits": 8 if op == "adam8bit" else 32}
    return FlatAdam([group], seed=0, split=weights == "split")


FORMS["ours"] = FORMS["reference"] = _flat


@_form("foreach")
def _(op: str, weights: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    return torch.optim.Adam(parameters, LR, foreach=True) if (op, weights) == ("adam", "fp32") else None


@_form("fused")
def _(op: str, weights: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    return torch.optim.Adam(parameters, LR, fused=True) if (op, weights) == ("adam", "fp32") else None


@_form("bitsandbytes")
def _(op: str, weights: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    if op != "adam8bit" or weights == "split":
        return None
    _package("bitsandbytes")
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(parameters, LR, min_8bit_size=0)


@_form("torchao")
def _(op: str, weights: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    if op != "adam8bit" or weights == "split":
        return None
    _package("torchao")
    from torchao.optim import Adam8bit

    return Adam8bit(parameters, LR, bf16_stochastic_round=weights == "bf16")


FORMS["bitsandbytes-flat"] = FORMS["bitsandbytes"]
"""bitsandbytes on one parameter of as many elements, as if all weights were padded into one buffer."""


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


def built(
    name: str, op: str, weights: str, sizes: Shapes, device: torch.device
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]] | None:
    """A form on its parameters; None if there is no such form. Raises UnavailableError."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    made = parameters(sizes, dtype, device, name.endswith("-flat"))
    optimizer = FORMS[name](op, weights, made)
    return None if optimizer is None else (optimizer, made)


def update_error(name: str, op: str, weights: str, device: torch.device) -> float | None:
    """Relative L2 error of three updates of the small set against Adam in float64; None if there is no such form."""
    made = built(name, op, weights, shapes("tiny"), device)
    if made is None:
        return None
    optimizer, found = made
    start = [p.detach().double() for p in found]
    true = [nn.Parameter(p.clone()) for p in start]
    for parameter, other in zip(true, found, strict=True):
        parameter.grad = other.grad.double()
    exact = torch.optim.Adam(true, LR)
    for _ in range(STEPS):
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
    row = OpRow(op, "step", size, f"P={num} in {len(sizes)}", weights, name, "eager", "warm")
    for field in dataclasses.fields(facts := measure.machine(device)):
        setattr(row, field.name, getattr(facts, field.name))
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
    made = built(name, op, weights, sizes, device)
    assert made is not None
    optimizer, _ = made
    num_bytes = num * BYTES[op][weights]
    times = measure.call_times(optimizer.step, device, seconds)
    copy = measure.copy_bandwidth(device)

    def timed(times: measure.Times, **changes: object) -> OpRow:
        rate = num_bytes / (times.p50 * 1e-3)
        return dataclasses.replace(row, ms_p20=times.p20, ms_p50=times.p50, ms_p80=times.p80, gb_s=rate / 1e9,
                                   compulsory_bytes=num_bytes, copy_gb_s=copy / 1e9, copy_share=rate / copy,
                                   **changes)  # fmt: skip

    if device.type == "cuda":
        row.launches = measure.launches(optimizer.step, device)
        row.peak_bytes = measure.peak_bytes(optimizer.step, device)
    yield timed(times)
    if device.type == "cuda" and isinstance(optimizer, FlatAdam):
        grads, offsets = optimizer.flat.gradients()
        table, stream = optimizer.table(grads, offsets).to(device), torch.cuda.Stream(device)
        replay = measure.Replay(lambda: optimizer.launch(grads, offsets, table), device, stream)
        yield timed(replay.times(seconds, flushed=False), call="replay")


@command("optimiser", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if one of our forms is wrong."""
    parser = OneLineParser(prog="python -m benchmarks.optimiser", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=("tiny", "graph", "unet"), help="default: unet, on a CPU graph")
    parser.add_argument("--backend", nargs="+", choices=list(FORMS), default=list(FORMS))
    add_flags(parser, "bench.csv, to which the rows are appended")
    parser.add_argument("--seconds", type=float, default=0.3, help="per timing (default %(default)s)")
    args = parser.parse_args(argv)
    device = args.device
    on_cuda = device.type == "cuda"
    if not on_cuda:
        print("CPU rows: the reference and the baselines. They say nothing about a GPU.")
    output = Output(file_in(args.out, "bench.csv"), OpRow, append=True)
    for size in args.size or (["unet"] if on_cuda else ["graph"]):
        num = sum(torch.Size(s).numel() for s in shapes(size))
        for op, forms in BYTES.items():
            for weights, each in forms.items():
                floors = ", ".join(f"{chip.name} {1e3 * num * each / chip.bytes_per_second:.2f} ms" for chip in CHIPS)
                print(f"{op} {size} {weights}: {each} bytes an element; PREDICTION of the least time: {floors}")
                for name in args.backend:
                    if (name == "ours") == on_cuda or name not in ("ours", "reference"):
                        try:
                            for row in rows(op, weights, size, name, device, args.seconds):
                                output.add(row)
                        finally:
                            ops.use_kernels("auto")
    return int(any(row.backend in ("ours", "reference") and row.status != "ok" for row in output.rows))


if __name__ == "__main__":
    sys.exit(main())
