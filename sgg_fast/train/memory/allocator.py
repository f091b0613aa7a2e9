"""Arithmetic of torch's caching allocator: how many bytes of segments serve a series of allocations.

A block of device memory comes out of a segment, which the allocator keeps when the block is freed. What no block uses
is a gap, and counts against the card. Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.14, with default settings.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Container

MIB = 2**20

SMALL_BLOCK, SMALL_SEGMENT = MIB, 2 * MIB
"""Blocks up to the first size share segments of the second."""

MEDIUM_BLOCK, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
"""Larger blocks below the first size share segments of the second; still larger ones have segments of their own."""

SEGMENT_STEP = 2 * MIB
"""Segments of a single block are multiples of it."""

SMALLEST = 512
"""Bytes that every block is a multiple of."""

GRAPHS = "graphs"
"""Name of the pool of captured graphs, whose segments are never given back."""

Event = tuple[int | str, int]
"""(key, bytes) of an allocation, (key, -1) of a release."""


def rounded(num_bytes: int, multiple: int = SMALLEST) -> int:
    """Round up to a multiple."""
    return -(-num_bytes // multiple) * multiple


@dataclasses.dataclass(eq=False)
class _Block:
    """A part of a segment; the parts of a segment are linked in the order of their addresses."""

    size: int
    address: int
    owner: list[_Block]
    """The free blocks of its kind and pool."""
    is_small: bool
    before: _Block | None = None
    after: _Block | None = None
    is_free: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """The key that free blocks are sorted by: the smallest that fits is taken, the lowest of several."""
        return self.size, self.address


class CachingAllocator:
    """Segments and blocks of one stream. The caller names allocations by keys of its own."""

    def __init__(self) -> None:
        self.reserved, self.peak = 0, 0
        """Bytes of all segments: now, and at most so far."""
        self._free: dict[tuple[str, bool], list[_Block]] = {}
        self._live: dict[int | str, _Block] = {}
        self._next_address = 0

    def run(self, events: list[Event], pool: str = "", aside: Container[int | str] = ()) -> None:
        """Replay a series. pool: name of the stream or graphs that it runs on; pools share no segment.

        aside: keys that a stream beside it allocates.
        """
        for key, size in events:
            if size >= 0:
                self.allocate(key, size, f"beside {pool}" if key in aside else pool)
            else:
                self.release(key)

    def allocate(self, key: int | str, size: int, pool: str = "") -> None:
        """Take a block: the smallest free one that is large enough, or a new segment."""
        size = rounded(max(size, 1))
        small = size <= SMALL_BLOCK
        free = self._free.setdefault((pool, small), [])
        place = bisect.bisect_left(free, (size, -1), key=lambda block: block.order)
        block = free.pop(place) if place < len(free) else self._segment(size, small, free)
        block.is_free = False
        rest = block.size - size
        if rest >= (SMALLEST if small else SMALL_BLOCK + 1):
            after = _Block(rest, block.address + size, free, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = after
            block.after, block.size = after, size
            self._put(after)
        self._live[key] = block

    def release(self, key: int | str) -> None:
        """Free a block and join it with free neighbours."""
        block = self._live.pop(key)
        for near in (block.before, block.after):
            if near is not None and near.is_free:
                near.owner.remove(near)
                block = self._joined(*((near, block) if near is block.before else (block, near)))
        self._put(block)

    def empty_cache(self) -> None:
        """Give segments without a block in use back to the device, except those of graphs."""
        for (pool, _), free in self._free.items():
            if pool != GRAPHS:
                whole = [block for block in free if block.before is None and block.after is None]
                self.reserved -= sum(block.size for block in whole)
                free[:] = [block for block in free if block not in whole]

    def _segment(self, size: int, small: bool, free: list[_Block]) -> _Block:
        of_size = MEDIUM_SEGMENT if size < MEDIUM_BLOCK else rounded(size, SEGMENT_STEP)
        total = SMALL_SEGMENT if small else of_size
        self.reserved += total
        self.peak = max(self.peak, self.reserved)
        self._next_address += total
        return _Block(total, self._next_address - total, free, small)

    def _put(self, block: _Block) -> None:
        block.is_free = True
        bisect.insort(block.owner, block, key=lambda block: block.order)

    @staticmethod
    def _joined(first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first
