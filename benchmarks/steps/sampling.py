"""Measures the sampling of every form for `benchmarks.infer`; the forms are in `infer_forms.py`.

Latents after a few steps are first compared with those of diffusers' pipeline in fp32; a mismatch prints no number.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.counts import kernels as counts
from benchmarks.harness import measure
from benchmarks.harness.output import OpRow, Output, device_of, failure, first_line, in_time
from benchmarks.ops.registry import DTYPES
from benchmarks.steps import forms
from benchmarks.steps.forms import Size
from benchmarks.steps.infer_forms import FORMS, GUIDANCE, SamplingForm, latents, open_models, reference
from sgg_fast.config import ConfigError
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.quiet import quiet_libraries

CHECK_STEPS = 2
FLOOR = 1e-4
"""Allowed relative error if low precision happens to be exact."""
REPEATS, QUICK_REPEATS = 3, 2


@dataclasses.dataclass
class PictureRow(OpRow):
    """`OpRow` of a batch of pictures, from the graphs to pixels on the host."""

    s_per_image: float | None = None
    images_per_s: float | None = None
    unet_launches: float | None = None
    """Launches that the host makes for the UNet, for one picture: kernels, or launches of a captured graph."""

    def line(self) -> str:
        numbers = self.status
        if self.s_per_image is not None:
            launched = "" if self.unet_launches is None else f"{self.unet_launches:9,.0f} UNet launches an image"
            numbers = f"{self.s_per_image:8.3f} s/image {self.images_per_s:8.2f} images/s {launched}"
        elif self.ms_p50 is not None:
            numbers = f"{self.ms_p50 / 1e3:8.2f} s to the first picture of a process, {self.call}"
        return f"{self.size:14} {self.backend:19} {numbers}"


def _row(size: Size, form: str, args: argparse.Namespace, device: torch.device) -> PictureRow:
    facts = dataclasses.asdict(measure.machine(device))
    shape = f"{args.steps} DDIM steps, guidance {GUIDANCE}"
    return PictureRow("infer", "sample", str(size), shape, args.dtype, form, "eager", "warm", **facts)


def mismatch(form: SamplingForm, exact: np.ndarray, low: np.ndarray) -> str:
    """The fault if the form's latents differ from the reference, else ""."""
    scale = float(np.linalg.norm(exact))
    off, allowed = (float(np.linalg.norm(x - exact)) / scale for x in (latents(form, CHECK_STEPS), low))
    allowed = 2 * allowed + FLOOR
    return "" if off <= allowed else f"latents off by {off:.1e}, {allowed:.1e} allowed"


def unet_launches(form: SamplingForm, num_steps: int, device: torch.device) -> float | None:
    """The value of `PictureRow.unet_launches`. On a CPU it counts aten's operators; a compiled model runs none."""
    if form.call == "replay":
        return num_steps / form.size.batch
    call = form.unet_call()
    if device.type == "cuda":
        num = measure.launches(call, device)
        return None if num is None else num * num_steps / form.size.batch
    if form.call == "compiled":
        return None
    with counts.OpCounter() as counter:
        call()
    return counter.count().launches * num_steps / form.size.batch


def _timed(row: PictureRow, form: SamplingForm, num_steps: int, repeats: int, device: torch.device) -> PictureRow:
    """The row with its numbers. The check has warmed up the UNet, but not the VAE."""
    form.draw(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        measure.synchronize(device)
        start = time.perf_counter()
        form.draw(num_steps)  # ends on the host
        seconds.append(time.perf_counter() - start)
    times = measure.times_of([1e3 * s for s in seconds])
    row.set_times(times)
    row.s_per_image = times.p50 / 1e3 / form.size.batch
    row.images_per_s = 1 / row.s_per_image
    row.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    row.gpu_clocks_mhz = measure.gpu_clocks(device)
    row.unet_launches = unet_launches(form, num_steps, device)
    return row


def measure_form(
    name: str, pipeline: SceneGraphToImagePipeline, size: Size, known: dict[Size, tuple[np.ndarray, np.ndarray]],
    args: argparse.Namespace, device: torch.device,
) -> PictureRow:  # fmt: skip
    """A row of one form, without numbers if its latents differ or it cannot run. `known`: references so far."""
    row, form = _row(size, name, args, device), None
    try:
        if size not in known:
            known[size] = reference(pipeline, size, CHECK_STEPS)
        form = FORMS[name](pipeline, size)
        row.call = form.call
        if reason := mismatch(form, *known[size]):
            row.status = f"mismatch: {reason}"
            return row
        return _timed(row, form, args.steps, QUICK_REPEATS if args.quick else REPEATS, device)
    except ValueError as error:
        row.status = f"skipped: {first_line(error)}"
        return row
    except RuntimeError as error:
        row.status = failure(error)
        return row
    finally:
        if form is not None:
            form.close()


def rows(args: argparse.Namespace, device: torch.device, deadline: float) -> Iterator[PictureRow]:
    """Rows size by size, with the compiling forms last; nothing new starts after the deadline."""
    pipeline = open_models(args.model, device, DTYPES[args.dtype])
    quick, compiled = ([name for name in args.form if ("compiled" in name) == late] for late in (False, True))
    sizes, known = forms.sizes(args.resolution, args.batch), {}
    for size, name in in_time([(s, name) for names in (quick, compiled) for s in sizes for name in names], deadline):
        yield measure_form(name, pipeline, size, known, args, device)
        gc.collect()


def cold_rows(args: argparse.Namespace, device: torch.device) -> Iterator[PictureRow]:
    """The first picture of a fresh process: without compiled kernels, then with the Triton cache of the first."""
    size, name = Size(min(args.resolution), 1), "captured" if device.type == "cuda" else "eager"
    words = [sys.executable, "-m", "benchmarks.infer", "--first-picture", "--form", name, "--dtype", args.dtype]
    words += ["--resolution", str(size.resolution), "--steps", str(args.steps), "--device", str(device)]
    words += ["--model", args.model] if args.model else []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        for kind in ("nothing compiled", "kernels cached") if device.type == "cuda" else ("no kernel to compile",):
            row = _row(size, name, args, device)
            row.mode, row.call = "cold start", kind
            done = subprocess.run(
                [*words, "--since", str(time.time())], cwd=measure.ROOT, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                row.status = f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1][:160]}"
            else:
                seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
                row.ms_p20 = row.ms_p50 = row.ms_p80 = 1e3 * seconds
            yield row


def first_picture(args: argparse.Namespace, device: torch.device) -> int:
    """Run in a process of its own: prints the seconds from `--since` to the first picture, less those of random
    weights."""
    start = time.time()
    pipeline = open_models(args.model, device, DTYPES[args.dtype])
    measure.synchronize(device)
    made = 0.0 if args.model else time.time() - start
    try:
        form = FORMS[args.form[0]](pipeline, Size(args.resolution[0], 1))
        form.draw(args.steps)
    except ValueError as error:  # a form that cannot run here
        raise ConfigError(str(error)) from error
    print(json.dumps({"seconds": time.time() - args.since - made}))
    return 0


def _against_diffusers(found: list[PictureRow]) -> None:
    """Ratios of the rows to diffusers' own at each size."""
    for stock in [row for row in found if row.backend == "diffusers" and row.s_per_image]:
        for row in found:
            if row.size == stock.size and row.s_per_image and row is not stock:
                print(f"{row.size:14} {row.backend:19} {stock.s_per_image / row.s_per_image:6.2f} x diffusers")


def run(args: argparse.Namespace) -> int:
    """The command; returns exit status 1 if a form did not match or failed."""
    deadline, device = time.perf_counter() + args.limit, device_of(args)
    on_gpu = device.type == "cuda"
    if not (on_gpu or args.quick or args.model):
        raise ConfigError("the true sizes need a GPU; --quick draws with the toy model here")
    args.dtype = args.dtype or ("fp16" if on_gpu else "fp32")
    quiet_libraries()
    if args.first_picture:
        return first_picture(args, device)
    output = Output(args.out, "infer.csv", PictureRow)
    print(measure.heading(device))
    if args.quick:
        print("TOY MODEL: these rows show that every form runs. They say nothing about Stable Diffusion.")
    for row in rows(args, device, deadline):
        output.add(row)
    _against_diffusers(output.rows)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    if not args.no_cold and time.perf_counter() < deadline:
        for row in cold_rows(args, device):
            output.add(row)
    return int(any(row.status.startswith(("mismatch", "failed")) for row in output.rows))
