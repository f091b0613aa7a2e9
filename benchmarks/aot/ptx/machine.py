"""The state that a block's function receives as `E`: active lanes, their memory, and exchanges within a warp."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.aot.ptx.arithmetic import f2, f4, f8, from_bf16, i4, i8, u2, u4
from benchmarks.aot.ptx.counts import Traffic
from benchmarks.aot.ptx.memory import Access, Memory, Notes
from benchmarks.aot.ptx.onchip import WARP, Local, Shared
from benchmarks.aot.ptx.program import Instruction, Program

Grid = tuple[int, int, int]
_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
           "xor": np.bitwise_xor}  # fmt: skip


@dataclasses.dataclass
class Copy:
    """An asynchronous copy to shared memory, by lane."""

    access: Access
    values: list[np.ndarray]
    group: np.ndarray
    """The thread's group that the copy belongs to, counted from 0."""
    done: np.ndarray


class Machine:
    """The threads of some CTAs, all in step or, after `focus`, those at one block."""

    def __init__(
        self, program: Program, memory: Memory, ctas: np.ndarray, grid: Grid, params: list, shared_bytes: int,
        notes: Notes, traffic: Traffic | None,
    ) -> None:  # fmt: skip
        self.threads = program.threads
        self.num_lanes = len(ctas) * self.threads
        spread = (ctas % grid[0], ctas // grid[0] % grid[1], ctas // (grid[0] * grid[1]))
        self._all = {
            "tid": np.tile(np.arange(self.threads, dtype=u4), len(ctas)),
            "cta_x": np.repeat(spread[0].astype(u4), self.threads),
            "cta_y": np.repeat(spread[1].astype(u4), self.threads),
            "cta_z": np.repeat(spread[2].astype(u4), self.threads),
            "cta": np.repeat(np.arange(len(ctas)), self.threads),
            "lane": np.arange(self.num_lanes, dtype=i4) + int(ctas[0]) * self.threads,
        }
        self.grid_x, self.grid_y, self.grid_z = (u4(n) for n in grid)
        self.num_threads = u4(self.threads)
        self.params, self.notes, self.traffic = params, notes, traffic
        self.global_ = memory
        self.shared = Shared(len(ctas), shared_bytes, memory.check, notes)
        self.local = Local(self.num_lanes, int(self._all["lane"][0]), program.local_bytes, notes)
        self._spaces = {"global": self.global_, "shared": self.shared, "local": self.local}
        self.copies: list[Copy] = []
        self.groups = np.zeros(self.num_lanes, i4)
        """Groups of copies that each thread has committed."""
        self.focus(None)

    def focus(self, where: np.ndarray | None) -> None:
        """Run the lanes at these places, or all."""
        for name, values in self._all.items():
            setattr(self, name, values if where is None else values[where])
        self._whole = where is None

    def cta_of_all(self) -> np.ndarray:
        """[lanes] row of each lane's CTA."""
        return self._all["cta"]

    def whole_warps(self, inst: Instruction) -> None:
        """Raises `PtxError` if part of a warp is at another block: the instruction needs the whole warp."""
        if self._whole:
            return
        lane = self.lane
        rows = lane.reshape(-1, WARP) if len(lane) % WARP == 0 else np.zeros((1, 2), i4)
        if (np.diff(rows, axis=1) != 1).any() or (rows[:, 0] % WARP != 0).any():
            raise inst.error("reached by part of a warp")
        self._whole = True

    def _access(self, address, mask, inst: Instruction) -> tuple[Access, np.ndarray | None]:
        """The request of the active lanes, and their places; None for all."""
        access = Access(np.broadcast_to(address, self.lane.shape), self.lane, self.cta, self.threads, inst)
        if mask is None or np.all(mask):
            return access, None
        where = np.flatnonzero(np.broadcast_to(mask, self.lane.shape))
        return access.only(where), where

    def _count(self, space: str, access: Access, num_bytes: int) -> None:
        if self.traffic is not None and len(access.lanes):
            self.traffic.request(space, access, num_bytes)

    def load(self, space: str, address, width: int, num: int, mask, old, inst: Instruction) -> list[np.ndarray]:
        """`num` words of `width` bytes a lane; `old` where the mask is false."""
        access, where = self._access(address, mask, inst)
        if not len(access.lanes):
            return old
        self._count(space, access, width * num)
        got = self._spaces[space].load(access, width, num)
        if where is None:
            return got
        out = [np.array(np.broadcast_to(o, self.lane.shape)) for o in old]
        for o, g in zip(out, got, strict=True):
            o[where] = g
        return out

    def store(self, space: str, address, values, width: int, mask, inst: Instruction) -> None:
        """One word of `width` bytes a lane for each value, where the mask is true."""
        access, where = self._access(address, mask, inst)
        if not len(access.lanes):
            return
        values = [np.broadcast_to(v, self.lane.shape) for v in values]
        if where is not None:
            values = [v[where] for v in values]
        self._count(space, access, width * len(values))
        self._spaces[space].store(access, values, width)

    def _place(self, lanes: np.ndarray) -> np.ndarray:
        """Place of a lane among all of this batch."""
        return lanes - self._all["lane"][0]

    def copy(self, to, source, num_bytes: int, size, mask, inst: Instruction) -> None:
        """cp.async of `num_bytes` a lane from global to shared memory; lanes of size 0 read nothing and write zeros."""
        access, where = self._access(to, mask, inst)
        if not len(access.lanes):
            return
        active = np.zeros(self.lane.shape, bool)
        active[slice(None) if where is None else where] = True
        size = np.broadcast_to(size, self.lane.shape)
        if not np.isin(size[active], (0, num_bytes)).all():
            raise inst.error("a copy of part of its words is not known")
        zeros = [np.zeros(self.lane.shape, u4)] * (num_bytes // 4)
        values = self.load("global", source, 4, num_bytes // 4, active & (size != 0), zeros, inst)
        self._count("shared", access, num_bytes)
        self.shared.begin_copy(access, num_bytes)
        group = self.groups[self._place(access.lanes)]
        self.copies.append(Copy(access, [v[active] for v in values], group, np.zeros(len(group), bool)))

    def commit_copies(self) -> None:
        """cp.async.commit_group: the active threads begin a new group."""
        self.groups[self._place(self.lane)] += 1

    def wait_copies(self, pending: int) -> None:
        """cp.async.wait_group: all but the last `pending` groups of the active threads arrive."""
        active = np.zeros(self.num_lanes, bool)
        active[self._place(self.lane)] = True
        for copy in self.copies:
            place = self._place(copy.access.lanes)
            arrived = active[place] & ~copy.done & (copy.group < self.groups[place] - pending)
            if arrived.any():
                where = np.flatnonzero(arrived)
                self.shared.end_copy(copy.access.only(where), [v[where] for v in copy.values], 4)
                copy.done |= arrived
        self.copies = [copy for copy in self.copies if not copy.done.all()]

    def shuffle(self, kind: str, x, b, inst: Instruction) -> np.ndarray:
        """shfl.sync over whole warps: each lane gets another lane's value, or its own if that lane is out of range."""
        self.whole_warps(inst)
        rows = np.broadcast_to(x, self.lane.shape).reshape(-1, WARP)
        b = np.broadcast_to(b, self.lane.shape).reshape(-1, WARP).astype(i8) & (WARP - 1)
        me = np.arange(WARP)
        source = {"bfly": me ^ b, "idx": b, "up": me - b, "down": me + b}[kind]
        source = np.where((source < 0) | (source >= WARP), me, source)
        return np.take_along_axis(rows, source, axis=1).ravel()

    def reduce(self, kind: str, x, members, inst: Instruction) -> np.ndarray:
        """redux.sync over whole warps."""
        self.whole_warps(inst)
        if not np.all(members == u4(0xFFFFFFFF)):
            raise inst.error("only reductions of the whole warp are known")
        rows = np.broadcast_to(x, self.lane.shape).reshape(-1, WARP)
        return np.repeat(_REDUCE[kind].reduce(rows, axis=1, dtype=rows.dtype), WARP)

    def mma(self, kind: str, a, b, c, inst: Instruction) -> list[np.ndarray]:
        """mma.sync m16n8k16: a [16, 16] b [16, 8] + c [16, 8] of each whole warp, by PTX's fragments.

        The sum is exact in float64 and rounded once; hardware keeps fewer digits and leaves the order open.
        """
        self.whole_warps(inst)
        a, b, c = ([np.broadcast_to(x, self.lane.shape).reshape(-1, WARP) for x in given] for given in (a, b, c))
        group, pair = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)
        left, right = np.zeros((len(a[0]), 16, 16), f8), np.zeros((len(a[0]), 16, 8), f8)
        for half in (0, 1):  # of a register: two adjacent values of k
            for j, register in enumerate(a):
                left[:, group + 8 * (j % 2), pair + half + 8 * (j // 2)] = _half(register, half, kind)
            for j, register in enumerate(b):
                right[:, pair + half + 8 * j, group] = _half(register, half, kind)
        product = left @ right
        return [(product[:, group + 8 * (j // 2), pair + j % 2] + c[j]).astype(f4).ravel() for j in range(4)]

    def ldmatrix(self, address, num: int, transposed: bool, inst: Instruction) -> list[np.ndarray]:
        """`num` 8 x 8 matrices of 16 bits: lanes 8 j .. 8 j + 7 hold the rows' addresses of matrix j."""
        self.whole_warps(inst)
        address = np.broadcast_to(address, self.lane.shape)
        lane = np.arange(len(address)) % WARP
        first = np.arange(len(address)) - lane
        out = []
        for j in range(num):
            if transposed:
                halves = []
                for k in (0, 1):
                    a = address[first + 8 * j + 2 * (lane % 4) + k] + (u4(2) * (lane // 4).astype(u4))
                    halves.append(self.load("shared", a, 2, 1, None, None, inst)[0].astype(u4))
                out.append(halves[0] | halves[1] << u4(16))
            else:
                a = address[first + 8 * j + lane // 4] + (u4(4) * (lane % 4).astype(u4))
                out += self.load("shared", a, 4, 1, None, None, inst)
        return out

    def stmatrix(self, address, values, transposed: bool, inst: Instruction) -> None:
        """8 x 8 matrices of 16 bits, one a register, to the rows whose addresses lanes 8 j .. 8 j + 7 hold."""
        self.whole_warps(inst)
        address = np.broadcast_to(address, self.lane.shape)
        lane = np.arange(len(address)) % WARP
        first = np.arange(len(address)) - lane
        for j, value in enumerate(values):
            value = np.broadcast_to(value, self.lane.shape)
            if transposed:
                for k in (0, 1):
                    a = address[first + 8 * j + 2 * (lane % 4) + k] + (u4(2) * (lane // 4).astype(u4))
                    self.store("shared", a, ((value >> u4(16 * k)).astype(u2),), 2, None, inst)
            else:
                a = address[first + 8 * j + lane // 4] + (u4(4) * (lane % 4).astype(u4))
                self.store("shared", a, (value,), 4, None, inst)


def _half(register: np.ndarray, half: int, kind: str) -> np.ndarray:
    """The lower or the upper 16 bits of registers as bf16 or f16."""
    bits = (register >> u4(16 * half)).astype(u2)
    return from_bf16(bits) if kind == "bf16" else bits.view(f2)
