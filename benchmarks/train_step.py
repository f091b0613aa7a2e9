"""A whole fine-tuning step: time, memory and images a second, in every available form.

    python -m benchmarks.train_step --stage finetune                          # SD v1.4's sizes, needs a GPU
    python -m benchmarks.train_step --stage finetune --memory-cap 24GiB       # a larger card in place of a 4090
    python -m benchmarks.train_step --stage finetune --quick                  # the toy's sizes, as a check only

Weights and images are random. Each form's losses are first compared with its own in fp32; a mismatch prints no number.
The forms are in `steps/train_forms.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counts import roofline
from benchmarks.harness import measure
from benchmarks.harness.output import OpRow, Output, add_flags, file_in, first_line
from benchmarks.steps import pretrain as pretrain_step
from benchmarks.steps import train_forms
from benchmarks.steps.train_forms import Size
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import Config, ConfigError, ModelConfig
from sgg_fast.quiet import quiet_libraries
from sgg_fast.train.memory.advice import budget_bytes
from sgg_fast.train.memory.blank import LARGEST_GRAPH, blank_foundation, latent_factor

CHIPS = (*roofline.CHIPS, roofline.Chip("H100", 3.35e12, 990e12))

NUM_LOSSES = 4
"""Number of steps whose losses are compared."""

FLOOR = 1e-5
"""Allowed error of a loss if low precision happens to be exact."""

GIB = 2**30

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""If true, launches can be counted without a GPU."""


@dataclasses.dataclass
class StepRow(OpRow):
    """`OpRow` of a step. Its bytes are the optimiser's compulsory ones; there is no copy to compare with."""

    images_per_s: float | None = None
    planned_bytes: int | None = None
    """Planned peak in bytes; only for our own forms."""
    flops: int | None = None
    """Counted operations of forward and backward through the UNet."""
    floor_ms: float | None = None
    """Milliseconds of those operations plus the optimiser's bytes, at the data sheet's rates."""
    over_floor: float | None = None
    """The median over the floor."""

    def line(self) -> str:
        numbers = self.status
        if self.ms_p50 is not None:
            peak = "" if self.peak_bytes is None else f"peak {self.peak_bytes / GIB:6.2f} GiB"
            planned = "" if self.planned_bytes is None else f"planned {self.planned_bytes / GIB:6.2f}"
            over = "" if self.over_floor is None else f"{self.over_floor:5.1f} x floor"
            numbers = f"{self.ms_p50:9.2f} ms {self.images_per_s:8.2f} images/s {peak} {planned} {over}"
        return f"{self.size:14} {self.backend:22} {numbers}"


@functools.cache
def step_flops(model: ModelConfig, resolution: int) -> int:
    """Floating-point operations of forward and backward for one image, on fake tensors."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        foundation = blank_foundation(model)
        unet, side = foundation.unet.requires_grad_(True), resolution // latent_factor(foundation)
        z = torch.randn(1, unet.config.in_channels, side, side)
        context = torch.randn(1, 80, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(z, torch.zeros(1, dtype=torch.int64), context).sample.sum().backward()
    return counter.get_total_flops()


def _floor(row: StepRow, device: torch.device) -> float | None:
    """Floor in milliseconds; None for a device without a known data sheet."""
    name = measure.machine(device).device
    chip = next((chip for chip in CHIPS if chip.name.split()[-1] in name.split()), None)
    if chip is None or row.flops is None or row.compulsory_bytes is None:
        return None
    return 1e3 * (row.flops / chip.flops + row.compulsory_bytes / chip.bytes_per_second)


def mismatch(form: train_forms.Form, size: Size) -> str:
    """The fault if the form's losses, prepared for `size`, differ from those of its fp32 reference; else ""."""
    exact, low = form.references[size]
    found = form.losses(NUM_LOSSES)
    allowed = 2 * max(abs(a - b) for a, b in zip(low, exact, strict=True)) + FLOOR
    off = max(abs(a - b) for a, b in zip(found, exact, strict=True))
    return "" if off <= allowed else f"losses off by {off:.2e}, {allowed:.2e} allowed"


def measure_form(
    name: str, config: Config, sizes: list[Size], device: torch.device, seconds: float
) -> Iterator[StepRow]:
    """Rows of one form, smallest size first, compared at each size; an out-of-memory error ends the sizes."""
    shape = f"{LARGEST_GRAPH[0]} objects, {LARGEST_GRAPH[1]} relations"
    facts = dataclasses.asdict(measure.machine(device))
    precision = "bf16"

    def row(size: Size, **changes: object) -> StepRow:
        call = train_forms.call_of(name)
        return StepRow("train_step", "finetune", str(size), shape, precision, name, call, "warm", **facts, **changes)  # type: ignore[arg-type]

    try:
        form = train_forms.build(name, config, sizes, device, NUM_LOSSES)
    except train_forms.UnavailableError as error:
        yield row(sizes[0], status=str(error))
        return
    except (ValueError, RuntimeError) as error:  # torch's out-of-memory error is one of them
        yield row(sizes[0], status=_failure(error))
        return
    skipped = ""
    for size in sizes:
        if skipped:
            yield row(size, status=skipped)
            continue
        try:
            form.prepare(size)
            if reason := mismatch(form, size):
                yield row(size, status=f"mismatch: {reason}")
            else:
                yield _timed(row(size), form, config.model, size, device, seconds)
        except RuntimeError as error:
            status = _failure(error)
            skipped = f"skipped: a smaller one {status.split(':')[0]}"
            yield row(size, planned_bytes=form.planned(size), status=status)


def _failure(error: Exception) -> str:
    kind = "ran out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {type(error).__name__}"
    return f"{kind}: {first_line(error)}"


def _timed(
    row: StepRow, form: train_forms.Form, model: ModelConfig, size: Size, device: torch.device, seconds: float
) -> StepRow:
    """The row with its numbers. The first steps allocate state and choose algorithms, and do not count."""
    for _ in range(3 if device.type == "cuda" else 1):
        form.step()
    if device.type == "cuda":
        measure.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times = measure.call_times(form.step, device, seconds)
    row.ms_p20, row.ms_p50, row.ms_p80 = times.p20, times.p50, times.p80
    row.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    row.gpu_clocks_mhz = measure.gpu_clocks(device)
    row.images_per_s = 1e3 * size.batch / times.p50
    row.planned_bytes = form.planned(size)
    row.compulsory_bytes, row.flops = form.optimiser_bytes, size.batch * step_flops(model, size.resolution)
    row.floor_ms = _floor(row, device)
    row.over_floor = None if row.floor_ms is None else times.p50 / row.floor_ms
    return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="python -m benchmarks.train_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", required=True, choices=("pretrain", "finetune"))
    parser.add_argument("--form", nargs="+", choices=[*train_forms.FORMS, *pretrain_step.FORMS], help="default: all")
    parser.add_argument("--resolution", nargs="+", type=int, help="default: 128 256 512")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 2 16; of pre-training 2 64")
    parser.add_argument("--memory-cap", help="let torch have no more of the card than this, such as 24GiB")
    parser.add_argument("--quick", action="store_true", help="the toy's sizes, on any device: that everything works")
    add_flags(parser, "train_step.csv or pretrain_step.csv")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no new form starts")
    return parser.parse_args(argv)


def _cap(text: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError("--memory-cap limits a GPU's memory, and there is none here")
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(budget_bytes(text) / total, 1.0), device)


@command("train_step", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if a form did not match or failed for another reason than memory, 2 for a wrong command line."""
    args = parse(argv)
    device = args.device
    if device.type != "cuda" and not args.quick and args.stage == "finetune":
        raise ConfigError("the true sizes need a GPU; --quick runs the toy's here")
    if args.memory_cap:
        _cap(args.memory_cap, device)
    if args.stage == "pretrain":
        quiet_libraries(verbose=False)
        path = file_in(args.out, "pretrain_step.csv")
        return pretrain_step.run(device, args.quick, args.form, args.batch, path, INTERPRETED)
    if unknown := [name for name in args.form or () if name not in train_forms.FORMS]:
        raise ConfigError(f"--form {unknown[0]} is not of --stage finetune")
    config, start = train_forms.settings(args.quick), time.perf_counter()
    resolutions = args.resolution or ([32] if args.quick else [128, 256, 512])
    batches = args.batch or ([2] if args.quick else [2, 16])
    sizes = sorted((Size(r, b) for r in resolutions for b in batches), key=lambda size: size.resolution**2 * size.batch)
    facts, output = measure.machine(device), Output(file_in(args.out, "train_step.csv"), StepRow)
    quiet_libraries(verbose=False)
    print(f"{facts.device} ({facts.cpu}), torch {facts.torch}, {facts.commit}")
    if args.quick:
        print("TOY SIZES: these rows show that every form runs. They say nothing about Stable Diffusion's step.")
    for name in args.form or train_forms.FORMS:
        if time.perf_counter() - start > args.limit:
            print(f"{name} and what follows left out: --limit {args.limit:.0f} s is spent")
            break
        for row in measure_form(name, config, sizes, device, seconds=0.1 if args.quick else 1.0):
            output.add(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any(row.status.startswith(("mismatch", "failed")) for row in output.rows))


if __name__ == "__main__":
    sys.exit(main())
