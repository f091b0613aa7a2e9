"""Graphs and strings of a large set as flat arrays, unpacked on request: a set costs bytes, not Python objects.

Letters: M images, N objects and E relations of all graphs, image nodes and their relations included.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, overload

import numpy as np

from sgg_fast.graph import SceneGraph

T = TypeVar("T")


class OnRequest(Sequence[T]):
    """A sequence that makes an item when it is asked for."""

    @abstractmethod
    def item(self, i: int) -> T:
        """Item `i`, 0 <= i < len."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]  # raises IndexError
        return self.item(places) if isinstance(places, int) else [self.item(i) for i in places]


class PackedGraphs(OnRequest[SceneGraph]):
    """The graphs of packed arrays, unpacked on request.

    arrays: object_name, predicate_name, subject, object, object_ptr and relation_ptr as in `SceneGraphBatch`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        self._arrays, self._names = arrays, names

    def __len__(self) -> int:
        return len(self._arrays["object_ptr"]) - 1

    def item(self, i: int) -> SceneGraph:
        arrays, names = self._arrays, self._names
        first, last = arrays["object_ptr"][i : i + 2].tolist()
        objects = tuple(names[k] for k in arrays["object_name"][first : last - 1].tolist())
        start, stop = arrays["relation_ptr"][i : i + 2].tolist()
        stop -= len(objects)  # relations to the image node come last
        ends = (arrays[role][start:stop] - first for role in ("subject", "object"))
        predicates = [names[k] for k in arrays["predicate_name"][start:stop].tolist()]
        return SceneGraph(objects, tuple(zip(next(ends).tolist(), predicates, next(ends).tolist(), strict=True)))


class JoinedGraphs(OnRequest[SceneGraph]):
    """Several sequences of graphs, one after the other."""

    def __init__(self, parts: Sequence[Sequence[SceneGraph]]) -> None:
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def item(self, i: int) -> SceneGraph:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._parts[part][i - int(self._starts[part])]


class PackedStrings(OnRequest[str]):
    """Strings as one run of UTF-8 bytes, and the place where each one ends."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends
        """uint8 and int64 [M]."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """Pack strings one by one."""
        text, ends = bytearray(), array("q")
        for string in strings:
            text += string.encode("utf-8")
            ends.append(len(text))
        return cls(
            np.frombuffer(text or b"", np.uint8), np.frombuffer(ends, np.int64) if ends else np.empty(0, np.int64)
        )

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, i: int) -> str:
        first = int(self.ends[i - 1]) if i else 0
        return self.text[first : int(self.ends[i])].tobytes().decode("utf-8")


class PackedRows(OnRequest[np.ndarray]):
    """Arrays [n, W] of float64, one an image, in one buffer."""

    def __init__(self, width: int) -> None:
        self._width, self._values, self._ends = width, array("d"), array("q")

    def append(self, rows: np.ndarray) -> None:
        """Add the rows of the next image."""
        self._values.frombytes(np.ascontiguousarray(rows, np.float64).tobytes())
        self._ends.append(len(self._values) // self._width)

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, i: int) -> np.ndarray:
        first, last = self._ends[i - 1] if i else 0, self._ends[i]
        return np.frombuffer(self._values, np.float64).reshape(-1, self._width)[first:last]
