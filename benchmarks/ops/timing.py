"""Measures the forms of the ops for `benchmarks.run`: each is compared with the reference, then timed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.counts import kernels as counts
from benchmarks.counts import model, roofline
from benchmarks.harness import measure, plots, verify
from benchmarks.harness.output import OpRow, Output, UnavailableError, device_of, first_line, in_time
from benchmarks.ops import baselines, registry
from benchmarks.ops.cases import MODES, Case
from benchmarks.ops.cases import cases as all_cases
from benchmarks.ops.registry import Inputs
from sgg_fast.ops.dispatch import why_not_triton

QUICK_COMPILE_SECONDS, COMPILE_SECONDS = 25, 240


@dataclasses.dataclass
class BenchSettings:
    """Time limits and options of the measurement."""

    device: torch.device
    backends: Sequence[str]
    seconds: float
    """Seconds per timing."""
    compile_seconds: float
    """Seconds for all of torch.compile's compilations together; later ones are skipped, with the reason in the row."""
    verify_only: bool = False


def runner(form: baselines.OpForm, inputs: Inputs, mode: str) -> Callable[[], object]:
    """The function that is timed. For "bwd" the forward runs here, once."""
    if mode == "fwd":
        no_grad = torch.no_grad()

        def forward() -> object:
            with no_grad:
                return form(inputs, inputs.tensors)

        return forward
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    listed = list(leaves.values())
    outputs = form(inputs, leaves)
    arriving = [registry.upstream(o.shape, o.dtype, o.device, i) for i, o in enumerate(outputs)]
    if mode == "bwd":
        return lambda: [*outputs, *torch.autograd.grad(outputs, listed, arriving, retain_graph=True)]

    def both() -> object:
        results = form(inputs, leaves)
        return [*results, *torch.autograd.grad(results, listed, arriving)]

    return both


def _row(case: Case, shape: registry.Shape | registry.ImageShape, backend: str, device: torch.device) -> OpRow:
    facts = dataclasses.asdict(measure.machine(device))
    return OpRow(case.op, case.mode, case.size, str(shape), case.dtype, backend, "eager", "warm", **facts)


def _least(case: Case, shape: registry.Shape | registry.ImageShape) -> roofline.Traffic:
    itemsize = registry.DTYPES.get(case.dtype, torch.int32).itemsize
    return roofline.compulsory(case.op, case.mode, shape, itemsize)


def _timed(row: OpRow, times: measure.Times, case: Case, inputs: Inputs, device: torch.device, **changes: str) -> OpRow:
    row = dataclasses.replace(row, **changes)
    chip = model.chip_of(row.device)
    if chip is not None:
        row.least_ms = 1e3 * _least(case, inputs.shape).seconds(chip)
        predicted = model.seconds(case.op, case.mode, case.size, case.dtype, chip) if row.backend == "ours" else None
        row.model_ms = None if predicted is None else 1e3 * predicted
    row.set_rate(times, _least(case, inputs.shape).bytes, measure.copy_bandwidth(device))
    return row


def _time_on_cuda(
    row: OpRow, form: baselines.OpForm, case: Case, inputs: Inputs, judge: verify.Judge, settings: BenchSettings
) -> Iterator[OpRow]:
    """Calls and captured launches, L2 warm and flushed. All work runs on one side stream, which the graph captures."""
    device, stream = settings.device, torch.cuda.Stream(settings.device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run = runner(form, inputs, case.mode)
        for _ in range(3):
            run()
        row.peak_bytes = measure.peak_bytes(run, device)
        row.launches = measure.launches(run, device)
        for flushed in (False, True):
            times = measure.call_times(run, device, settings.seconds, flushed)
            row.gpu_clocks_mhz = measure.gpu_clocks(device)
            yield _timed(row, times, case, inputs, device, l2="flushed" if flushed else "warm")
    row = dataclasses.replace(row, call="replay")
    if (case.op, row.backend) in baselines.READ_BACK:  # cannot be captured (`measure.Replay`)
        yield dataclasses.replace(row, status="not capturable: reads sizes back to the host")
        return
    try:
        replay = measure.Replay(run, device, stream)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        yield dataclasses.replace(row, status=f"not capturable: {first_line(error)}")
        return
    verdict = judge.verdict([t.detach() for t in replay.result], row.backend)
    if verdict.reason:
        yield dataclasses.replace(row, status=f"mismatch in replay: {verdict.reason}")
        return
    for flushed in (False, True):
        times = replay.times(settings.seconds, flushed)
        row.gpu_clocks_mhz = measure.gpu_clocks(device)
        yield _timed(row, times, case, inputs, device, l2="flushed" if flushed else "warm")


def _time_on_cpu(
    row: OpRow, form: baselines.OpForm, case: Case, inputs: Inputs, settings: BenchSettings
) -> Iterator[OpRow]:
    if row.backend != "compile":
        counters = counts.observe(form, inputs, backward=case.mode != "fwd")
        row.launches = sum(c.count().launches for c in (counters[1:] if case.mode == "bwd" else counters))
    times = measure.call_times(runner(form, inputs, case.mode), settings.device, settings.seconds)
    yield _timed(row, times, case, inputs, settings.device)


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """Errors of one form (torch's and the compilers'), which must not lose the other rows."""
    if importlib.util.find_spec("triton") is None:
        return RuntimeError, ValueError
    from triton.errors import TritonError

    return RuntimeError, ValueError, TritonError


def measure_form(
    case: Case, inputs: Inputs, judge: verify.Judge, backend: str, form: baselines.OpForm, settings: BenchSettings
) -> Iterator[OpRow]:
    """Rows of one form. It is compared with the reference first; a mismatch is one row without a number."""
    row = _row(case, inputs.shape, backend, settings.device)
    start = time.perf_counter()
    try:
        results = verify.run(form, inputs, inputs.tensors, case.mode)
        verdict = judge.verdict(results, backend)
        del results
        row.error = None if math.isnan(verdict.error) else verdict.error
        if backend == "compile":
            settings.compile_seconds -= time.perf_counter() - start
        if verdict.reason:
            row.status = f"mismatch: {verdict.reason}"
            yield row
        elif settings.verify_only:
            row.status = "verified"
            yield row
        elif settings.device.type == "cuda":
            yield from _time_on_cuda(row, form, case, inputs, judge, settings)
        else:
            yield from _time_on_cpu(row, form, case, inputs, settings)
    except torch.OutOfMemoryError as error:
        yield dataclasses.replace(row, status=f"out of memory: {first_line(error)}")
    except _failures() as error:
        yield dataclasses.replace(row, status=f"failed: {type(error).__name__}: {first_line(error)}")


def _form(case: Case, backend: str, device: torch.device) -> baselines.OpForm | None:
    """The form of a case; None if the backend has none. Raises UnavailableError if it cannot run on `device`."""
    form = baselines.form(case.op, backend)
    if form is not None and backend == "ours" and (reason := why_not_triton(device)):
        raise UnavailableError(f"skipped: {reason}")
    return form


def measure_case(case: Case, settings: BenchSettings) -> Iterator[OpRow]:
    """Rows of every form of one case."""
    device = settings.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shape = registry.inputs(case, "meta").shape
    least = _least(case, shape).bytes
    if least > measure.free_bytes(device):
        row = _row(case, shape, "all", device)
        yield dataclasses.replace(row, status=f"skipped: moves {least / 1e9:.0f} GB, more than there is")
        return
    try:
        inputs = registry.inputs(case, device)
        judge = verify.Judge(case, inputs)
    except torch.OutOfMemoryError as error:
        yield dataclasses.replace(_row(case, shape, "all", device), status=f"out of memory: {first_line(error)}")
        return
    for backend in settings.backends:
        row = _row(case, shape, backend, device)
        if backend == "ours" and device.type != "cuda" and not settings.verify_only:
            continue  # the interpreter is never timed
        if backend == "compile" and settings.compile_seconds <= 0:
            if (case.op, "eager") in baselines.FORMS:
                yield dataclasses.replace(row, status="skipped: the time for compilation is spent")
            continue
        try:
            form = _form(case, backend, device)
        except UnavailableError as error:
            yield dataclasses.replace(row, status=str(error))
            continue
        if form is not None:
            yield from measure_form(case, inputs, judge, backend, form, settings)
    torch.compiler.reset()


def print_predictions(cases: list[Case]) -> None:
    """Print the data sheets' predictions for the same cases, without a GPU."""
    print("\nPREDICTION, not a measurement, in microseconds: the least (compulsory bytes and operations over rates of\n"
          "data sheets), and the model's for our kernels at the sizes that the PTX machine has run:")  # fmt: skip
    print(f"{'case':36} {'MB':>10} " + " ".join(f"{chip.name:>10} {'ours':>8}" for chip in roofline.CHIPS))
    for case in cases:
        traffic = _least(case, registry.inputs(case, "meta").shape)
        name = f"{case.op} {case.mode} {case.size} {case.dtype}"
        times = ""
        for chip in roofline.CHIPS:
            ours = model.seconds(case.op, case.mode, case.size, case.dtype, chip)
            times += f" {1e6 * traffic.seconds(chip):10.2f} {'' if ours is None else f'{1e6 * ours:.2f}':>8}"
        print(f"{name:36} {traffic.bytes / 1e6:10.3f}{times}")


def defaults(args: argparse.Namespace, device: torch.device) -> tuple[list[Case], BenchSettings]:
    """The cases and the settings of the command line on `device`."""
    on_gpu = device.type == "cuda"
    sizes = ["paper", "vg16"] if args.quick else ["paper", "vg2", "vg16", "vg64", "vg256", "1e5", "512px"]
    if on_gpu and not args.quick:  # the targets' sizes first
        sizes = ["paper", "1e6", "512px", "512px16", "vg2", "vg16", "vg64", "vg256", "1e5", "1e7"]
    dtypes = args.dtype or (["bf16", "fp32"] if on_gpu else ["fp32"])
    modes = args.mode or (["fwd", "fwd_bwd"] if args.quick else list(MODES))
    cases = all_cases(args.op, args.size or sizes, dtypes, modes, args.width)
    seconds = 0.02 if on_gpu else 0.1 if args.quick else 0.4
    compile_seconds = args.compile_seconds
    if compile_seconds is None:
        compile_seconds = QUICK_COMPILE_SECONDS if args.quick else COMPILE_SECONDS
    return cases, BenchSettings(device, args.backend, seconds, compile_seconds, args.verify_only)


def run(args: argparse.Namespace) -> int:
    """The command; returns exit status 1 if one of our forms failed or did not match."""
    start, device = time.perf_counter(), device_of(args)
    cases, settings = defaults(args, device)
    name = "verify.csv" if args.verify_only else "bench.csv"
    output = Output(args.out, name, OpRow)
    print(measure.heading(device))
    if args.verify_only:
        verify.widen_products()
        print("results are compared, nothing is timed")
    else:
        if device.type != "cuda":
            print("CPU rows: the reference and the baselines. They say nothing about a GPU.")
        print(f"this machine's copy bandwidth: {measure.copy_bandwidth(device) / 1e9:.1f} GB/s (read and written)")
    print(f"{'case':36} {'backend':9} {'call':6} {'L2':7} {'p20':>9} {'p50':>9} {'p80':>9}")
    for case in in_time(cases, start + args.limit):
        for row in measure_case(case, settings):
            output.add(row)
    if device.type != "cuda" and not args.verify_only:
        print_predictions(cases)
    if args.out and not (args.verify_only or args.no_plots):
        plots.draw(args.out / name, args.out)
    return int(any(row.backend == "ours" and row.status.startswith(("mismatch", "failed")) for row in output.rows))
