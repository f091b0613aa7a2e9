"""A translated program and its launches: scheduling of threads, and counters.

All CTAs of a batch advance together. If threads diverge, those at the lowest block go first. They meet the others again
where the paths join, because the compiler lays blocks out in that order. A barrier holds a thread until every thread of
the batch waits or has exited.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from benchmarks.aot.ptx import arithmetic
from benchmarks.aot.ptx.arithmetic import UNSIGNED, i8
from benchmarks.aot.ptx.counts import Row, Traffic
from benchmarks.aot.ptx.machine import Grid, Machine
from benchmarks.aot.ptx.memory import Memory, Notes
from benchmarks.aot.ptx.onchip import WARP
from benchmarks.aot.ptx.program import TYPES, Program, PtxError, home, size_of
from benchmarks.aot.ptx.translate import EXIT, Translator

LANES = 1 << 14
"""Threads that run together; their registers fit in the cache."""
WAIT = 1 << 20
"""Added to the block that a thread enters after its barrier, while it waits there."""


def _unset(register: str) -> Any:
    """Initial content of a register."""
    t = home(register)
    return np.False_ if t == "b" else UNSIGNED[size_of(t)](0)


class Kernel:
    """One program. `executed` counts the warps that entered each block, over all launches."""

    def __init__(self, text: str, shared_bytes: int) -> None:
        self.program = Program(text)
        self.shared_bytes = shared_bytes
        self.executed = np.zeros(len(self.program.blocks), i8)
        self.counted = np.zeros_like(self.executed)
        self.lane_steps = self.num_warps = 0
        self.notes: Notes = collections.Counter()
        self.traffic = Traffic()
        translator, source = Translator(self.program), []
        self._blocks = []
        for k in range(len(self.program.blocks)):
            code, reads, outs = translator.block(k)
            source.append(code)
            self._blocks.append((reads, outs))
        self.source = "\n".join(source)
        """The translation, for reading."""
        names = vars(arithmetic) | translator.constants | translator.instructions
        names |= {"true_": np.True_, "false_": np.False_}
        exec(compile(self.source, f"<{self.program.name}>", "exec"), names)
        self._functions = [names[f"b{k}"] for k in range(len(self._blocks))]

    def launch(
        self, grid: Grid, params: list, memory: Memory, *, count: bool = False, sample: int | None = None
    ) -> None:
        """Run every CTA, or `sample` of them. params: numbers and addresses in order. Raises `PtxError` for a fatal
        fault; others go to `notes`."""
        if len(params) != len(self.program.params):
            raise PtxError(f"{self.program.name}: {len(params)} arguments for {len(self.program.params)} parameters")
        values = [_parameter(v, t) for v, (t, _) in zip(params, self.program.params, strict=True)]
        total, step = grid[0] * grid[1] * grid[2], max(1, LANES // self.program.threads)
        chosen = np.arange(total)
        if sample is not None and sample < total:
            chosen = np.unique(np.linspace(0, total - 1, sample).astype(i8))
        self.num_warps += len(chosen) * self.program.threads // WARP * count
        for buffer in memory.buffers:  # earlier launches are complete, so they cannot race with this one
            buffer.forget()
        memory.notes = self.notes
        executed = self.executed.copy()
        with np.errstate(all="ignore"):
            for first in range(0, len(chosen), step):
                ctas = chosen[first : first + step]
                traffic = self.traffic if count else None
                machine = Machine(self.program, memory, ctas, grid, values, self.shared_bytes, self.notes, traffic)
                self._run(machine)
        if count:
            self.counted += self.executed - executed

    def add_to(self, row: Row) -> None:
        """Add the launches with `count` to a row of the table."""
        row.add(self.program.blocks, self.counted, self.num_warps, self.traffic)

    def _run(self, machine: Machine) -> None:
        """Run one batch of CTAs to its end."""
        registers: dict[str, Any] = {}
        here, at = 0, None  # the block of all lanes, or (at) of each lane
        while True:
            where = None
            if at is not None:
                here = int(at.min())
                if WAIT <= here < EXIT:
                    self._release(machine, at)
                    continue
                if here < WAIT:
                    where = np.flatnonzero(at == here)
                    if len(where) == machine.num_lanes:
                        at = where = None
            if here >= len(self._functions):
                return
            machine.focus(where)
            self.executed[here] += len(np.unique(machine.lane // WARP))
            self.lane_steps += len(self.program.blocks[here]) * len(machine.lane)
            target = self._step(machine, registers, here, where)
            if where is None and np.ndim(target) == 0:
                here = int(target)
                if WAIT <= here < EXIT:
                    machine.shared.barrier()
                    here -= WAIT
                continue
            if at is None:
                at = np.empty(machine.num_lanes, i8)
            at[slice(None) if where is None else where] = target

    def _release(self, machine: Machine, at: np.ndarray) -> None:
        """Release the threads at a barrier once every thread waits or has exited."""
        waiting = at < EXIT
        low = np.full(machine.num_lanes // machine.threads, EXIT, i8)
        np.minimum.at(low, machine.cta_of_all()[waiting], at[waiting])
        if (at[waiting] != low[machine.cta_of_all()[waiting]]).any():
            self.notes["threads of a CTA wait at different barriers"] += 1
        if not waiting.reshape(-1, machine.threads).all(axis=1)[low < EXIT].all():
            self.notes["some threads of a CTA wait at a barrier that others have left behind"] += 1
        machine.shared.barrier()
        at[waiting] -= WAIT

    def _step(self, machine: Machine, registers: dict[str, Any], here: int, where: np.ndarray | None) -> Any:
        """Run one block; returns the next block, of all lanes or of each lane."""
        reads, outs = self._blocks[here]
        given = [registers.get(name) for name in reads]
        given = [_unset(name) if v is None else v for name, v in zip(reads, given, strict=True)]
        if where is None:
            end, values = self._functions[here](machine, *given)
            registers.update(zip(outs, values, strict=True))
        else:
            end, values = self._functions[here](machine, *(v[where] if np.ndim(v) else v for v in given))
            for name, value in zip(outs, values, strict=True):
                old = registers.get(name, value.dtype.type(0))
                merged = np.array(np.broadcast_to(old, machine.num_lanes))
                merged[where] = value
                registers[name] = merged
        if end[0] == "next":
            return here + 1
        if end[0] == "bar":
            return here + 1 + WAIT
        _, taken, yes, no = end
        if np.all(taken):
            return yes
        return np.where(taken, yes, no) if np.any(taken) else no


def _parameter(value: Any, type_: str) -> np.generic:
    """A launch's argument as the bits of its PTX type."""
    if isinstance(value, np.generic):
        return value
    width = size_of(TYPES[type_])
    return UNSIGNED[width](int(value) % 2 ** (8 * width))
