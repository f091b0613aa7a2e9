"""Milliseconds, bytes and launches of a function on this machine, and facts about the machine.

CUDA: every repetition lies between two events of its own; the L2 is warm, or overwritten before each repetition. CPU:
wall clock, caches warm. Triton's interpreter is never timed. This module does not know any op.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]

MIN_REPEATS, MAX_REPEATS = 5, 200

GRAPH_COPIES = 20
"""Upper bound of the copies of a function captured in one graph for times with a warm L2."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Quantiles over the repetitions, milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine of a row."""

    device: str
    cpu: str
    torch: str
    triton: str
    commit: str
    date: str


def times_of(milliseconds: list[float]) -> Times:
    """Quantiles of some repetitions."""
    return Times(*(float(q) for q in np.quantile(milliseconds, [0.2, 0.5, 0.8])))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """This checkout's commit, with `-dirty` if sources differ; without git a hash of the sources' text.

    The environment variable SGG_COMMIT overrides it, for a copy of the tree without its history.
    """
    if "SGG_COMMIT" in os.environ:
        return os.environ["SGG_COMMIT"]
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        digest = hashlib.sha256()
        for folder in ("benchmarks", "kernels", "sgg_fast"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        return f"sources-{digest.hexdigest()[:12]}"


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} x{os.cpu_count()}"


@functools.cache
def machine(device: torch.device) -> Machine:
    """Facts about this machine."""
    threads = f"CPU, {torch.get_num_threads()} threads"
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        cpu=_cpu_model(),
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    )


def heading(device: torch.device) -> str:
    """One line about this machine, above a command's rows."""
    facts = machine(device)
    return f"{facts.device} ({facts.cpu}), torch {facts.torch}, triton {facts.triton}, {facts.commit}"


def gpu_clocks(device: torch.device) -> str:
    """ "SM/memory" in MHz right now, by nvidia-smi; empty if it does not answer."""
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "-i"]
    try:
        found = subprocess.run(
            [*query, str(device.index or 0)], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return "/".join(part.strip() for part in found.strip().split(","))


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Memory available to a case: the card's free memory, or a quarter of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    """A buffer of four times the L2, at least 256 MiB."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(4 * l2, 2**28), dtype=torch.uint8, device=device)


def _once(run: Callable[[], object], device: torch.device) -> float:
    """Approximate seconds of one warm call."""
    run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return max(time.perf_counter() - start, 1e-7)


def call_times(run: Callable[[], object], device: torch.device, seconds: float, flushed: bool = False) -> Times:
    """Times of single calls from Python, for about `seconds`."""
    repeats = int(min(max(seconds / _once(run, device), MIN_REPEATS), MAX_REPEATS))
    if device.type != "cuda":
        assert not flushed, "there is no L2 to flush on a CPU"
        milliseconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            milliseconds.append(1e3 * (time.perf_counter() - start))
        return times_of(milliseconds)
    buffer = _flush_buffer(device) if flushed else None
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_event, end_event in pairs:
        if buffer is not None:
            buffer.zero_()
        start_event.record()
        run()
        end_event.record()
    synchronize(device)
    return times_of([start_event.elapsed_time(end_event) for start_event, end_event in pairs])


class Replay:
    """`run` captured in a CUDA graph: once, and many times in a row for times with a warm L2.

    A failed capture leaves traces: up to torch 2.13 its memory pool stays reserved until the process ends
    (pytorch#180395, #190348), and `torch.cuda.graph` leaves its stream the current one.
    """

    def __init__(self, run: Callable[[], object], device: torch.device, stream: torch.cuda.Stream) -> None:
        """Capture `run`, which was warmed up on `stream`. Raises RuntimeError if that fails (`run` synchronises,
        say)."""
        self.device, self.stream = device, stream
        self.once, self.result = self._capture(run, 1)
        self.copies = int(min(max(1, 2e-3 / _once(self.once.replay, device)), GRAPH_COPIES))
        self.many = self.once if self.copies == 1 else self._capture(run, self.copies)[0]

    def _capture(self, run: Callable[[], object], copies: int) -> tuple[torch.cuda.CUDAGraph, object]:
        graph, result, before = torch.cuda.CUDAGraph(), None, torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(copies):
                    result = run()
        except RuntimeError:
            torch.cuda.set_stream(before)
            raise
        return graph, result

    def times(self, seconds: float, flushed: bool) -> Times:
        """Times of one `run` inside the captured graph."""
        if flushed:
            return call_times(self.once.replay, self.device, seconds, flushed=True)
        many = call_times(self.many.replay, self.device, seconds)
        return Times(*(t / self.copies for t in dataclasses.astuple(many)))


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call launches on the GPU, by torch's profiler; None if it records none."""
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(device)
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_gpu) or None


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak allocation of one call above the allocation before it; None on a CPU, where torch does not track it."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by this machine's own copy of a buffer far beyond its caches."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    times = call_times(lambda: target.copy_(source), device, 0.3)
    return 2 * size / (times.p50 * 1e-3)


def environment() -> dict[str, object]:
    """Versions and hardware of this run, so the files are readable on their own."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    facts: dict[str, object] = dataclasses.asdict(machine(device))
    facts |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "clocks_mhz": gpu_clocks(device),
            "copy_gb_s": copy_bandwidth(device) / 1e9,
        }
        torch.cuda.empty_cache()  # the parts are other processes
    return facts
