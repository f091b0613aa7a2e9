"""Measures the fine-tuning step of every form for `benchmarks.train_step`; the forms are in `train_forms.py`.

Each form's losses are first compared with its own in fp32; a mismatch prints no number.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import time
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counts import roofline
from benchmarks.harness import measure
from benchmarks.harness.output import OpRow, Output, UnavailableError, device_of, failure, in_time
from benchmarks.steps import forms, train_forms
from benchmarks.steps.forms import Size
from sgg_fast.config import Config, ConfigError, ModelConfig
from sgg_fast.quiet import quiet_libraries
from sgg_fast.train.memory.advice import budget_bytes
from sgg_fast.train.memory.blank import LARGEST_GRAPH, blank_foundation

CHIPS = (*roofline.CHIPS, roofline.Chip("H100", 3.35e12, 990e12, 132, 1.7e9, 5e-7))

NUM_LOSSES = 4
"""Number of steps whose losses are compared."""

FLOOR = 1e-5
"""Allowed error of a loss if low precision happens to be exact."""

GIB = 2**30


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
        unet, side = foundation.unet.requires_grad_(True), resolution // foundation.latent_factor
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
    call = train_forms.call_of(name)

    def row(size: Size, **changes: object) -> StepRow:
        return StepRow("train_step", "finetune", str(size), shape, "bf16", name, call, "warm", **facts, **changes)

    try:
        form = train_forms.build(name, config, sizes, device, NUM_LOSSES)
    except UnavailableError as error:
        yield row(sizes[0], status=str(error))
        return
    except (ValueError, RuntimeError) as error:  # torch's out-of-memory error is one of them
        yield row(sizes[0], status=failure(error))
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
            status = failure(error)
            skipped = f"skipped: a smaller one {status.split(':')[0]}"
            yield row(size, planned_bytes=form.planned(size), status=status)


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
    row.set_times(times)
    row.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    row.gpu_clocks_mhz = measure.gpu_clocks(device)
    row.images_per_s = 1e3 * size.batch / times.p50
    row.planned_bytes = form.planned(size)
    row.compulsory_bytes, row.flops = form.optimiser_bytes, size.batch * step_flops(model, size.resolution)
    row.floor_ms = _floor(row, device)
    row.over_floor = None if row.floor_ms is None else times.p50 / row.floor_ms
    return row


def _cap(text: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError("--memory-cap limits a GPU's memory, and there is none here")
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(budget_bytes(text) / total, 1.0), device)


def run(args: argparse.Namespace) -> int:
    """The command; returns exit status 1 if a form did not match or failed for another reason than memory."""
    deadline, device = time.perf_counter() + args.limit, device_of(args)
    if device.type != "cuda" and not args.quick:
        raise ConfigError("the true sizes need a GPU; --quick runs the toy's here")
    if args.memory_cap:
        _cap(args.memory_cap, device)
    config = train_forms.settings(args.quick)
    resolutions = args.resolution or ([32] if args.quick else [128, 256, 512])
    sizes = forms.sizes(resolutions, args.batch or ([2] if args.quick else [2, 16]))
    output = Output(args.out, "train_step.csv", StepRow)
    quiet_libraries(verbose=False)
    print(measure.heading(device))
    if args.quick:
        print("TOY SIZES: these rows show that every form runs. They say nothing about Stable Diffusion's step.")
    chosen = args.form or [name for name in forms.FINETUNE if not (args.quick and forms.compiles(name))]
    for name in in_time(chosen, deadline):
        for row in measure_form(name, config, sizes, device, seconds=0.1 if args.quick else 1.0):
            output.add(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any(row.status.startswith(("mismatch", "failed")) for row in output.rows))
