"""A host that runs some programs of every launch and notes what a warp of each launch executed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from benchmarks.aot.ptx.arithmetic import u8
from benchmarks.aot.ptx.counts import SECTOR
from benchmarks.aot.ptx.host import Host
from benchmarks.aot.ptx.program import Instruction, operands
from benchmarks.counts.model import Launch


def chained_loads(block: list[Instruction]) -> float:
    """Longest chain of loads from global memory within a block, each of which needs the one before.

    A wait for asynchronous copies that leaves n groups in flight counts as 1 / (n + 1) of a load.
    """
    depth: dict[str, int] = {}
    longest, waits = 0, 0.0
    for inst in block:
        written, read = operands(inst)
        if inst.op == "cp.async.wait_group":
            waits += 1 / (int(inst.args[0]) + 1)
        here = max((depth.get(r, 0) for r in read), default=0) + inst.op.startswith("ld.global")
        longest = max(longest, here)
        for r in written:
            depth[r] = max(depth.get(r, 0), here) if inst.predicate else here
    return longest + waits


def moved(touched: list[np.ndarray], args: tuple, ratio: float) -> int:
    """Bytes that a launch moves, each sector once: those that the programs that ran touched, times `ratio`.

    No tensor of `args` counts for more than its own bytes: programs share weights and gathered rows.
    """
    sectors = np.unique(np.concatenate(touched)) if touched else np.empty(0, u8)
    total, left = 0.0, np.ones(len(sectors), bool)
    storages = [t.untyped_storage() for t in args if isinstance(t, torch.Tensor)]
    for storage in {each.data_ptr(): each for each in storages}.values():
        first, num = storage.data_ptr() // SECTOR, storage.nbytes()
        mine = left & (sectors >= first) & (sectors * u8(SECTOR) < storage.data_ptr() + num)
        total += min(num, SECTOR * ratio * int(mine.sum()))
        left &= ~mine
    return round(total + SECTOR * ratio * int(left.sum()))


class Observer(Host):
    """Counts, and checks nothing: programs that do not run leave memory unwritten."""

    def __init__(self, arch: str, programs: int) -> None:
        super().__init__(arch, check=False, count=True)
        self.sample = programs
        self._taken: list[Launch] = []

    def taken(self) -> list[Launch]:
        """The launches since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def run(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        """Run one launch and note it."""
        _, program = self.program_of(kernel, compiled)
        before, warps = program.counted.copy(), program.num_warps
        program.traffic.touched = []
        super().run(kernel, compiled, grid, args, options)
        touched, program.traffic.touched = program.traffic.touched, None
        warps = program.num_warps - warps
        entered = (program.counted - before) / warps
        blocks = program.program.blocks
        self._taken.append(
            Launch(
                kernel.__name__,
                math.prod(grid),
                program.program.threads // 32,
                round(float(sum(n * len(b) for n, b in zip(entered, blocks, strict=True))), 1),
                round(float(sum(n * chained_loads(b) for n, b in zip(entered, blocks, strict=True))), 2),
                moved(touched, args, max(1.0, math.prod(grid) / self.sample)),
            )
        )
