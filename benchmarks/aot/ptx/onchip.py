"""Shared and local memory: filled with poison, and checked for uninitialised reads and missing barriers."""

from __future__ import annotations

import numpy as np

from benchmarks.aot.ptx.arithmetic import UNSIGNED, i4, i8, u1
from benchmarks.aot.ptx.memory import ARRIVING, MANY, NOBODY, Access, Notes

WARP = 32
POISON = 0xFF
"""Every byte before it is written: NaN as a float, -1 as an integer."""


class Shared:
    """Shared memory of the CTAs that run together, one row each.

    Between two barriers no two warps may access a place that one of them writes.
    """

    def __init__(self, num_ctas: int, num_bytes: int, check: bool, notes: Notes) -> None:
        self.limit, self.row = num_bytes, -(-max(num_bytes, 16) // 16) * 16
        self.raw = np.full(num_ctas * self.row, POISON, u1)
        self.views = {w: self.raw.view(UNSIGNED[w]) for w in UNSIGNED}
        self.check, self.notes = check, notes
        self.epoch = np.zeros(num_ctas, i4)
        """Barriers that each CTA has passed."""
        if check:
            self.writer, self.wrote, self.reader, self.read = (np.full(self.raw.size, NOBODY, i4) for _ in range(4))

    def barrier(self) -> None:
        """Every CTA passes a barrier."""
        self.epoch += 1

    def _places(self, access: Access, num_bytes: int) -> np.ndarray:
        a = access.address.astype(i8)
        if ((a < 0) | (a + num_bytes > self.limit)).any():
            raise access.inst.error(f"outside of the {self.limit} bytes of shared memory")
        if (a & (num_bytes - 1)).any():
            raise access.inst.error(f"an address that {num_bytes} does not divide")
        return a + access.ctas * self.row

    def load(self, access: Access, width: int, num: int) -> list[np.ndarray]:
        """`num` words of `width` bytes a lane."""
        at = self._places(access, width * num)
        if self.check:
            self._saw(access, at, width * num)
        return [self.views[width][at // width + j] for j in range(num)]

    def store(self, access: Access, values: list[np.ndarray], width: int) -> None:
        """One word of `width` bytes a lane for each of `values`."""
        at = self._places(access, width * len(values))
        for j, value in enumerate(values):
            place, view = at // width + j, self.views[width]
            before = view[place]
            view[place] = value
            if self.check:
                lost = view[place] != value
                if lost.any():
                    access.note(self.notes, "writes different values to one place")
                self._wrote(access, at + width * j, width, (before != value) | lost)

    def begin_copy(self, access: Access, num_bytes: int) -> None:
        """An asynchronous copy may write from now on, until `end_copy`: the places hold poison."""
        at = self._places(access, num_bytes)
        if self.check:
            self._wrote(access, at, num_bytes, np.ones(len(at), bool))
            self.writer[at[:, None] + np.arange(num_bytes)] = ARRIVING
        self.raw[at[:, None] + np.arange(num_bytes)] = POISON

    def end_copy(self, access: Access, values: list[np.ndarray], width: int) -> None:
        """The threads have waited for their copy: it has written, as a store of theirs."""
        at = self._places(access, width * len(values))
        if self.check:
            places = at[:, None] + np.arange(width * len(values))
            if (self.writer[places] != ARRIVING).any():
                access.note(self.notes, "copies to a place that was written before it arrived")
            self.writer[places] = (access.lanes // WARP)[:, None]
        self.store(access, values, width)

    def _saw(self, access: Access, at: np.ndarray, num_bytes: int) -> None:
        at = at[:, None] + np.arange(num_bytes)
        warp, epoch = (access.lanes // WARP)[:, None], self.epoch[access.ctas][:, None]
        writer = self.writer[at]
        if (writer == NOBODY).any():
            access.note(self.notes, "reads shared memory that nothing wrote")
        if (writer == ARRIVING).any():
            access.note(self.notes, "reads what an unfinished copy writes")
        if ((self.wrote[at] == epoch) & (writer != warp)).any():
            access.note(self.notes, "reads another warp's write, no barrier between")
        another = (self.read[at] == epoch) & (self.reader[at] != warp)
        self.reader[at] = warp
        another |= self.reader[at] != warp
        self.reader[at[another]] = MANY
        self.read[at] = np.broadcast_to(epoch, at.shape)

    def _wrote(self, access: Access, at: np.ndarray, width: int, differs: np.ndarray) -> None:
        at, differs = at[:, None] + np.arange(width), differs[:, None]
        warp, epoch = (access.lanes // WARP)[:, None], self.epoch[access.ctas][:, None]
        if ((self.wrote[at] == epoch) & (self.writer[at] != warp) & differs).any():
            access.note(self.notes, "over another warp's write, no barrier between")
        if ((self.read[at] == epoch) & (self.reader[at] != warp) & differs).any():
            access.note(self.notes, "over what another warp reads, no barrier between")
        self.writer[at] = warp
        self.wrote[at] = np.broadcast_to(epoch, at.shape)


class Local:
    """Local memory: a row of bytes for each thread."""

    def __init__(self, num_lanes: int, first_lane: int, num_bytes: int, notes: Notes) -> None:
        self.limit, self.row, self.first_lane, self.notes = (
            num_bytes,
            -(-max(num_bytes, 1) // 16) * 16,
            first_lane,
            notes,
        )
        raw = np.full(num_lanes * self.row if num_bytes else 0, POISON, u1)
        self.views = {w: raw.view(UNSIGNED[w]) for w in UNSIGNED}
        self.written = np.zeros(raw.size, bool)

    def _places(self, access: Access, num_bytes: int) -> np.ndarray:
        a = access.address.astype(i8)
        if ((a < 0) | (a + num_bytes > self.limit) | (a & (num_bytes - 1) != 0)).any():
            raise access.inst.error(f"outside of the {self.limit} bytes of local memory, or not aligned")
        return a + (access.lanes - self.first_lane).astype(i8) * self.row

    def load(self, access: Access, width: int, num: int) -> list[np.ndarray]:
        """`num` words of `width` bytes a lane."""
        at = self._places(access, width * num)
        if not self.written[at[:, None] + np.arange(width * num)].all():
            access.note(self.notes, "reads local memory that nothing wrote")
        return [self.views[width][at // width + j] for j in range(num)]

    def store(self, access: Access, values: list[np.ndarray], width: int) -> None:
        """One word of `width` bytes a lane for each of `values`."""
        at = self._places(access, width * len(values))
        self.written[at[:, None] + np.arange(width * len(values))] = True
        for j, value in enumerate(values):
            self.views[width][at // width + j] = value
