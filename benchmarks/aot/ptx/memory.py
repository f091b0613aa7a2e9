"""Global memory: registered storages of this process, with every access checked.

Faults of bounds and alignment raise at once. Races between CTAs, and reads of unwritten memory, are recorded, and the
launch continues.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import dataclasses
from collections.abc import Callable

import numpy as np

from benchmarks.aot.ptx.arithmetic import UNSIGNED, i4, i8, u1, u8
from benchmarks.aot.ptx.program import Instruction

NOBODY, MANY, ARRIVING = -1, -2, -3
ALLOCATION = 16
"""Granularity of an allocator in bytes. A kernel may read up to the rounded size, but not write."""

Notes = collections.Counter
"""Fault -> number of occurrences."""


@dataclasses.dataclass
class Access:
    """One request: the active lanes."""

    address: np.ndarray
    lanes: np.ndarray
    """Index of the thread in the launch."""
    ctas: np.ndarray
    """Row of the thread's CTA in the batch."""
    threads: int
    """Threads of a CTA."""
    inst: Instruction

    def only(self, where: np.ndarray) -> Access:
        """The lanes at these places."""
        return dataclasses.replace(self, address=self.address[where], lanes=self.lanes[where], ctas=self.ctas[where])

    def note(self, notes: Notes, what: str) -> None:
        """Count a fault under the instruction's line."""
        notes[f"line {self.inst.line} ({self.inst.source}): {self.inst.op} {what}"] += 1


class Buffer:
    """One storage and, if accesses are checked, the threads that touched each granule of it in this launch."""

    def __init__(self, base: int, num_bytes: int, name: str, granule: int, written: np.ndarray | None, check: bool):
        self.base, self.end, self.name = base, base + num_bytes, name
        rounded = -(-num_bytes // ALLOCATION) * ALLOCATION
        self.limit = base + rounded
        raw = np.frombuffer((ctypes.c_uint8 * rounded).from_address(base), dtype=u1)
        self.views = {w: raw.view(UNSIGNED[w]) for w in UNSIGNED}
        self.granule, self.written = granule, written
        self.writer = np.full(rounded // granule, NOBODY, i4) if check else None
        self.reader = np.full(rounded // granule, NOBODY, i4) if check else None

    def granules(self, offset: np.ndarray, num_bytes: int) -> np.ndarray:
        """[.., k] granules of the `num_bytes` at each offset."""
        first = offset // self.granule
        return first[:, None] + np.arange(max(1, num_bytes // self.granule))

    def forget(self) -> None:
        """Forget accesses at the start of a launch."""
        if self.writer is not None:
            self.writer.fill(NOBODY)
            self.reader.fill(NOBODY)


class Memory:
    """Registered storages by address."""

    def __init__(self, check: bool, notes: Notes) -> None:
        self.bases: list[int] = []
        self.buffers: list[Buffer] = []
        self.check, self.notes = check, notes
        self.resolve: Callable[[int], tuple[int, int] | None] = lambda address: None
        """Asked for (base, bytes) of an address that no argument of the launch holds: tables of addresses."""

    def add(self, base: int, num_bytes: int, name: str, itemsize: int = 1, written: np.ndarray | None = None) -> None:
        """Register a storage. written: one bool for each byte, updated by stores; None if every byte has been
        written."""
        place = bisect.bisect_left(self.bases, base)
        if num_bytes == 0:
            return
        if place < len(self.bases) and self.bases[place] == base:
            self.buffers[place].granule = min(self.buffers[place].granule, itemsize, 4)
            if self.check:
                fresh = Buffer(base, num_bytes, name, self.buffers[place].granule, written, True)
                self.buffers[place] = fresh
            return
        self.bases.insert(place, base)
        self.buffers.insert(place, Buffer(base, num_bytes, name, min(itemsize, 4), written, self.check))

    def _find(self, address: int, num_bytes: int, inst: Instruction) -> Buffer:
        for asked in (False, True):
            k = bisect.bisect(self.bases, address) - 1
            if k >= 0 and address + num_bytes <= self.buffers[k].limit:
                return self.buffers[k]
            found = None if asked else self.resolve(address)
            if found is None:
                break
            self.add(*found, "what a table points to")
        past = f"; {address + num_bytes - self.buffers[k].end} bytes past {self.buffers[k].name}" if k >= 0 else ""
        raise inst.error(f"{address:#x} is outside of every buffer{past}")

    def _by_buffer(self, access: Access, num_bytes: int) -> list[tuple[Buffer, np.ndarray | None]]:
        """Each buffer with the places of its lanes, None for all."""
        a, inst = access.address, access.inst
        if np.any(a & u8(num_bytes - 1)):
            raise inst.error(f"an address that {num_bytes} does not divide")
        buffer = self._find(int(a.min()), num_bytes, inst)
        if int(a.max()) + num_bytes <= buffer.limit:
            return [(buffer, None)]
        out, left = [], np.ones(a.shape, bool)
        while left.any():
            buffer = self._find(int(a[left].min()), num_bytes, inst)
            here = left & (a < u8(buffer.limit))
            self._find(int(a[here].max()), num_bytes, inst)
            out.append((buffer, np.flatnonzero(here)))
            left &= ~here
        return out

    def load(self, access: Access, width: int, num: int) -> list[np.ndarray]:
        """`num` words of `width` bytes a lane."""
        parts = self._by_buffer(access, width * num)
        out = [np.empty(access.address.shape, UNSIGNED[width]) for _ in range(num)]
        for buffer, where in parts:
            mine = access if where is None else access.only(where)
            offset = (mine.address - u8(buffer.base)).view(i8)
            if self.check:
                self._saw(mine, buffer, offset, width * num)
            for j, o in enumerate(out):
                o[slice(None) if where is None else where] = buffer.views[width][offset // width + j]
        return out

    def store(self, access: Access, values: list[np.ndarray], width: int) -> None:
        """One word of `width` bytes a lane for each of `values`."""
        num_bytes = width * len(values)
        for buffer, where in self._by_buffer(access, num_bytes):
            mine = access if where is None else access.only(where)
            if int(mine.address.max()) + num_bytes > buffer.end:
                raise access.inst.error(f"writes past the end of {buffer.name}")
            offset = (mine.address - u8(buffer.base)).view(i8)
            for j, value in enumerate(values):
                value, view = value if where is None else value[where], buffer.views[width]
                place = offset // width + j
                if not self.check:
                    view[place] = value
                    continue
                before = view[place]
                view[place] = value
                lost = view[place] != value
                if lost.any():
                    mine.note(self.notes, f"writes different values to one place of {buffer.name}")
                self._wrote(mine, buffer, offset + width * j, width, (before != value) | lost)

    def _saw(self, access: Access, buffer: Buffer, offset: np.ndarray, num_bytes: int) -> None:
        at = buffer.granules(offset, num_bytes)
        cta = (access.lanes // access.threads)[:, None]
        if buffer.written is not None and not buffer.written[np.minimum(offset, len(buffer.written) - 1)].all():
            access.note(self.notes, f"reads what nothing wrote in {buffer.name}")
        writer = buffer.writer[at]
        if ((writer != NOBODY) & (writer != cta)).any():
            access.note(self.notes, f"reads what another CTA writes in {buffer.name}")
        before = buffer.reader[at]
        buffer.reader[at] = cta
        several = (buffer.reader[at] != cta) | ((before != NOBODY) & (before != cta))
        buffer.reader[at[several]] = MANY

    def _wrote(self, access: Access, buffer: Buffer, offset: np.ndarray, width: int, differs: np.ndarray) -> None:
        at = buffer.granules(offset, width)
        cta, differs = (access.lanes // access.threads)[:, None], differs[:, None]
        if buffer.written is not None:
            buffer.written[(offset[:, None] + np.arange(width)).ravel()] = True
        writer, reader = buffer.writer[at], buffer.reader[at]
        if ((writer != NOBODY) & (writer != cta) & differs).any():
            access.note(self.notes, f"and another CTA write different values to one place of {buffer.name}")
        if ((reader != NOBODY) & (reader != cta) & differs).any():
            access.note(self.notes, f"writes what another CTA reads in {buffer.name}")
        buffer.writer[at] = cta
