"""The time that a model gives each of our kernels, and a whole step. A prediction.

A kernel takes the largest of bytes, issue and latency; a step the sum of its terms (`step_terms`).

The least time of an op assumes one perfect kernel. This model takes the launches that run: their programs and warps,
the instructions and dependent loads of a warp as the PTX machine counted them (`benchmarks.aot.observe`), and the bytes
that they touch, each sector of 32 once. A launch takes the largest of

    bytes / bandwidth
    programs of the busiest SM x warps x instructions of a warp / schedulers / clock
    waves of programs x dependent loads of a warp x latency of a load

It leaves out the gap between launches, and counts PTX where `ptxas` issues fewer instructions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

from benchmarks.counts.roofline import CHIPS, Chip
from benchmarks.ops.cases import SIZES

DATA = pathlib.Path(__file__).resolve().parents[1] / "baselines" / "launches.json"
SCHEDULERS = 4
"""Of an SM; each issues one instruction of a warp a clock."""
SCALED = "1e5"
"""The size whose launches stand for larger numbers of relations: their grids and bytes grow with the relations."""
STEPS = DATA.with_name("steps.json")
"""Counts of whole steps, as `python -m benchmarks.counts.step --write` left them."""
EFFICIENCY = {"RTX 4090": 0.55, "H200": 0.33}
"""Share of a chip's dense rate that convolutions and GEMMs of small batches reach: assumed. The H200's is what MLPerf
v5.0's 144 images a second at 512 x 512 leave to arithmetic."""
GAP = 1.3e-6
"""Seconds between two kernels of a graph; assumed."""
RESIDENT_WARPS = 16
"""Warps that every kernel's registers and shared memory allow on an SM, at least (`benchmarks.aot`)."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as the machine ran it."""

    kernel: str
    programs: int
    warps: int
    """Of a program."""
    instructions: float
    """PTX instructions of a warp."""
    loads: float
    """Loads of a warp that wait for one another; loads that are issued together count once."""
    bytes: int
    """Of its tensors, each sector that it touches once."""

    def seconds(self, chip: Chip) -> float:
        """Time on `chip` without the gap before it."""
        busiest = -(-self.programs // chip.sms)
        issue = busiest * self.warps * self.instructions / SCHEDULERS / chip.clock
        waves = -(-busiest // max(1, RESIDENT_WARPS // self.warps))
        return max(self.bytes / chip.bytes_per_second, issue, waves * self.loads * chip.latency)

    def times(self, ratio: float) -> Launch:
        """The launch on `ratio` times as many rows."""
        return dataclasses.replace(self, programs=round(self.programs * ratio), bytes=round(self.bytes * ratio))


@functools.cache
def observed() -> dict[str, list[list[Launch]]]:
    """ "op size dtype" -> launches of the forward and of the backward, as committed."""
    if not DATA.is_file():
        return {}
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return {name: [[Launch(**launch) for launch in launches] for launches in passes] for name, passes in found.items()}


def seconds(op: str, mode: str, size: str, dtype: str, chip: Chip) -> float | None:
    """Time of our kernels of a case on a chip; None if the machine has run neither it nor a smaller one of its kind."""
    passes = observed().get(f"{op} {size} {dtype}")
    smaller = observed().get(f"{op} {SCALED} {dtype}")
    if passes is None and smaller is not None and size in SIZES and SIZES[size][1] > SIZES[SCALED][1]:
        ratio = SIZES[size][1] / SIZES[SCALED][1]
        passes = [[launch.times(ratio) for launch in launches] for launches in smaller]
    if passes is None:
        return None
    chosen = {"fwd": passes[:1], "bwd": passes[1:], "fwd_bwd": passes, "step": passes}[mode]
    return sum(launch.seconds(chip) for launches in chosen for launch in launches)


def chip_of(device: str) -> Chip | None:
    """The chip that a device's name names; None for others."""
    return next((chip for chip in CHIPS if chip.name in device), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """Launches, bytes and operations of a part of a step."""

    launches: int
    bytes: int
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """The parts of a captured step."""

    compute: Work
    """Forward and backward."""
    update: Work
    """The optimiser."""

    @classmethod
    def scaled(cls, small: StepCounts, large: StepCounts, pixels: int) -> StepCounts:
        """Continued to `pixels` times the pixels of `small`, from it and from `large`, of four times its pixels.

        Bytes are those of weights plus those of activations, which grow with the pixels; operations grow with the
        images of `large`.
        """
        activations = (large.compute.bytes - small.compute.bytes) / 3
        moved = small.compute.bytes + (pixels - 1) * activations
        compute = Work(large.compute.launches, round(moved), round(large.compute.flops * pixels / 4))
        return cls(compute, large.update)


@functools.cache
def steps() -> dict[str, StepCounts]:
    """Name of a step ("finetune 256 b2") -> its counts, as committed."""
    if not STEPS.is_file():
        return {}
    found = json.loads(STEPS.read_text(encoding="utf-8"))
    return {name: StepCounts(*(Work(**step[part]) for part in ("compute", "update"))) for name, step in found.items()}


def step_terms(counts: StepCounts, chip: Chip) -> dict[str, float]:
    """Seconds of each term of a captured step; their sum is the step's.

    Nothing overlaps: an update behind backward counts as if it came after it, so the step is predicted too slow.
    """
    launches = counts.compute.launches + counts.update.launches
    return {
        "convolutions and GEMMs": counts.compute.flops / chip.flops / EFFICIENCY[chip.name],
        "bytes of forward and backward": counts.compute.bytes / chip.bytes_per_second,
        "bytes of the optimiser": counts.update.bytes / chip.bytes_per_second,
        "gaps between kernels": launches * GAP,
    }
