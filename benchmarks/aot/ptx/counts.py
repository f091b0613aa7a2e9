"""Counters of the machine: instructions of a warp by kind, sectors of its requests, bank conflicts, barriers.

They count the PTX, before `ptxas` schedules, fuses and drops moves. They measure no time.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from benchmarks.aot.ptx.arithmetic import u8
from benchmarks.aot.ptx.memory import Access
from benchmarks.aot.ptx.program import Instruction

SECTOR, WARP, BANKS = 32, 32, 32
KINDS = ("float", "special", "integer", "convert", "select", "move", "global", "shared", "warp", "control", "matrix")

_FLOATS = {"add", "sub", "mul", "fma", "min", "max", "neg", "abs", "mad"}
_SPECIAL = {"div", "sqrt", "rsqrt", "rcp", "ex2", "lg2"}
_OTHER = {"setp": "select", "selp": "select", "cvt": "convert", "mov": "move", "cvta": "move", "shfl": "warp",
          "redux": "warp", "bra": "control", "ret": "control", "exit": "control", "bar": "control",
          "ldmatrix": "shared", "stmatrix": "shared", "cp": "global", "mma": "matrix"}  # fmt: skip


def kind_of(inst: Instruction) -> str:
    """The kind of `KINDS` of an instruction; reading a parameter is a move."""
    stem, of_floats = inst.parts[0], inst.parts[-1] in ("f32", "f32x2", "bf16", "bf16x2", "f16", "f16x2")
    if stem in ("ld", "st"):
        space = inst.parts[1]
        return {"global": "global", "shared": "shared", "local": "global"}.get(space, "move")
    if stem in _OTHER:
        return _OTHER[stem]
    if stem in _SPECIAL and of_floats:
        return "special"
    return "float" if stem in _FLOATS and of_floats else "integer"


@dataclasses.dataclass
class Requests:
    """Counts of one load or store."""

    requests: int = 0
    """Requests by a warp with at least one active lane."""
    sectors: int = 0
    """Sectors of 32 bytes, distinct within a request; in shared memory, passes."""
    useful: int = 0
    """Distinct bytes requested; in shared memory, the passes that the width alone needs."""


def _distinct_per_group(keys: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(groups, number of distinct keys in each)"""
    pairs = np.unique(np.stack([group, keys]), axis=1)
    return np.unique(pairs[0], return_counts=True)


class Traffic:
    """Requests by instruction."""

    def __init__(self) -> None:
        self.by_instruction: dict[Instruction, Requests] = collections.defaultdict(Requests)
        self.touched: list[np.ndarray] | None = None
        """Sectors of global memory that each request touches, if the caller sets a list."""

    def request(self, space: str, access: Access, num_bytes: int) -> None:
        """Count one instruction whose lanes request `num_bytes` each."""
        entry = self.by_instruction[access.inst]
        warp, address = access.lanes.astype(u8) // u8(WARP), access.address.astype(u8)
        entry.requests += len(np.unique(warp))
        if space == "shared":
            passes, least = self._passes(access.lanes.astype(u8), address, num_bytes)
            entry.sectors, entry.useful = entry.sectors + passes, entry.useful + least
            return
        key, sector = (warp << u8(47)) | address, address // u8(SECTOR)
        entry.sectors += len(np.unique((warp << u8(47)) | sector))
        if self.touched is not None:
            self.touched.append(np.unique(sector))
        entry.useful += len(np.unique(key)) * num_bytes

    def _passes(self, lanes: np.ndarray, address: np.ndarray, num_bytes: int) -> tuple[int, int]:
        """(passes through the banks, fewest possible passes): 128 bytes a pass.

        Lanes of one pass that request two words of one bank need one more pass each.
        """
        lanes_a_pass = WARP // max(1, num_bytes // 4)
        phase = lanes // u8(lanes_a_pass)
        words = (address[:, None] // u8(4) + np.arange(max(1, num_bytes // 4), dtype=u8)).ravel()
        phase = np.repeat(phase, max(1, num_bytes // 4))
        banks, num = _distinct_per_group(words, phase * u8(BANKS) + words % u8(BANKS))
        phases = banks // u8(BANKS)
        starts = np.flatnonzero(np.concatenate([[True], phases[1:] != phases[:-1]]))
        return int(np.maximum.reduceat(num, starts).sum()), len(starts)


@dataclasses.dataclass
class Row:
    """One kernel's line in the table."""

    name: str
    warps: int = 0
    instructions: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    barriers: int = 0
    loads: Requests = dataclasses.field(default_factory=Requests)
    stores: Requests = dataclasses.field(default_factory=Requests)
    shared: Requests = dataclasses.field(default_factory=Requests)

    def add(self, blocks: list[list[Instruction]], executed: np.ndarray, warps: int, traffic: Traffic) -> None:
        """Count the runs of one program."""
        self.warps += warps
        for block, times in zip(blocks, executed, strict=True):
            for inst in block:
                self.instructions[kind_of(inst)] += int(times)
                self.barriers += int(times) * (inst.op == "bar.sync")
        for inst, seen in traffic.by_instruction.items():
            kind = kind_of(inst)
            into = self.shared if kind == "shared" else self.loads if inst.parts[0] == "ld" else self.stores
            into.requests += seen.requests
            into.sectors += seen.sectors
            into.useful += seen.useful

    def line(self) -> str:
        """Instructions and barriers of a warp; sectors a request and useful share; extra passes a shared request."""
        each = " ".join(f"{self.instructions[kind] / max(self.warps, 1):8.1f}" for kind in KINDS)
        total = sum(self.instructions.values()) / max(self.warps, 1)
        memory = "  ".join(_share(r) for r in (self.loads, self.stores))
        barriers = self.barriers / max(self.warps, 1)
        conflicts = (self.shared.sectors - self.shared.useful) / max(self.shared.requests, 1)
        return f"{self.name:36} {total:8.0f} {each}  {memory}  {conflicts:7.2f} {barriers:6.1f}"

    def cells(self) -> list[str]:
        """The row of the table in kernels/README.md."""
        warps, memory = max(self.warps, 1), []
        for r in (self.loads, self.stores):
            share = 100 * r.useful / max(SECTOR * r.sectors, 1)
            memory += [f"{r.sectors / max(r.requests, 1):.1f}", f"{share:.0f}%"] if r.requests else ["", ""]
        kinds = ("float", "special", "integer", "move", "global", "shared", "warp")
        conflicts = (self.shared.sectors - self.shared.useful) / max(self.shared.requests, 1)
        return [
            f"`{self.name.removesuffix('_kernel')}`", f"{sum(self.instructions.values()) / warps:.0f}",
            *(f"{self.instructions[kind] / warps:.1f}" for kind in kinds), *memory,
            f"{conflicts:.2f}", f"{self.barriers / warps:.1f}",
        ]  # fmt: skip


def _share(r: Requests) -> str:
    if not r.requests:
        return f"{'-':>6} {'-':>6}"
    return f"{r.sectors / r.requests:6.1f} {100 * r.useful / (SECTOR * r.sectors):4.0f} %"


def header() -> str:
    """Header of `Row.line`."""
    kinds = " ".join(f"{kind:>8}" for kind in KINDS)
    memory = f"{'loads':>6} {'useful':>6}  {'stores':>6} {'useful':>6}"
    return f"{'a warp':36} {'all':>8} {kinds}  {memory}  {'bank +':>7} {'bar':>6}"
