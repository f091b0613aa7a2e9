"""The result of planning: a run's memory by part and phase, its gaps, and whether it fits a budget."""

from __future__ import annotations

import dataclasses

GIB = 2**30

OUTSIDE = GIB
"""Bytes of the budget reserved for what the plan does not count."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory of a step. All sizes in bytes."""

    title: str
    resident: dict[str, int]
    """Allocated on the device all the time, by part."""
    moments: dict[str, dict[str, int]]
    """Phase (forward, backward, update, sample sheet) -> what its highest point adds to `resident`."""
    host: dict[str, int]
    """In CPU memory, by part."""
    gaps: int = 0
    """What the allocator takes from the card beyond the peak."""

    @property
    def when(self) -> str:
        """Phase of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Sizes at the peak by part, largest first."""
        found = {**self.resident, **self.moments[self.when]}
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """Bytes that torch takes from the card: the peak and the gaps."""
        return self.peak + self.gaps

    def fits(self, budget: int) -> bool:
        """Whether `reserved` and what is not counted stay within `budget`."""
        return self.reserved + OUTSIDE <= budget

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        rows = [f"{name:42} {size / GIB:8.3f} GiB" for name, size in self.parts.items()]
        moments = ", ".join(
            f"{name} {(sum(self.resident.values()) + sum(extra.values())) / GIB:.2f}"
            for name, extra in self.moments.items()
        )
        host = [f"in CPU memory: {name:27} {size / GIB:8.3f} GiB" for name, size in self.host.items()]
        return [
            self.title,
            *rows,
            f"{'peak, in ' + self.when:42} {self.peak / GIB:8.3f} GiB  ({moments})",
            *([f"{'gaps between blocks':42} {self.gaps / GIB:8.3f} GiB"] if self.gaps else []),
            *host,
        ]
