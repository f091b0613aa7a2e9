"""The whole graph at once: share of pictures without a fault, by number of objects, and colour binding.

A recall of 94 % hides that many pictures have some fault, which viewers see first. A picture has no fault if every
object is there, once, with its colour, every relation that can be judged holds, and it shows nothing else. A ground
that the graph does not name (a sky behind a boat) is not a fault.

Letters: S seeds, G graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sgg_fast.eval import bootstrap
from sgg_fast.eval.detector import Instance
from sgg_fast.eval.relations import is_ground
from sgg_fast.graph import SceneGraph

Parse = Callable[[str], tuple[str, str | None]]
"""Name -> (category, colour): `Detector.parse`."""

NUMBERS = ((1, 4), (5, 5), (6, 6), (7, 99))
"""Ranges of the number of objects of a graph: the rows of the table."""


def num_extra(asked: Sequence[str], chosen: Sequence[Instance | None], instances: Sequence[Instance]) -> int:
    """Instances that match no object; grounds that no object is named after do not count.

    asked: the objects' categories; chosen: the instance of each, or None.
    """
    taken = {id(x) for x in chosen if x is not None}
    free = [x for x in instances if id(x) not in taken]
    return sum(x.category in asked or not is_ground(x.category) for x in free)


def bound(asked: Sequence[tuple[str, str | None]], chosen: Sequence[Instance | None]) -> list[bool]:
    """For each two objects of different categories with different colours: whether each shows its own.

    asked: category and colour of each object. A pair is judged only if both objects are there with colours that are
    read.
    """
    there = [
        (category, colour, x.colour)
        for (category, colour), x in zip(asked, chosen, strict=True)
        if x is not None and x.colour is not None and colour is not None
    ]
    return [
        a[1] == a[2] and b[1] == b[2] for k, a in enumerate(there) for b in there[:k] if a[0] != b[0] and a[1] != b[1]
    ]


def faultless_table(
    graphs: Sequence[SceneGraph], faultless_SG: np.ndarray, parse: Parse
) -> dict[str, dict[str, float]]:
    """Share of the pictures [S, G] (0 or 1) without a fault: of all, by number of objects, by two of a kind.

    Each row has its number of graphs and 95 % interval. Rows without graphs are left out.
    """  # fmt: skip
    sizes = np.array([len(graph.objects) for graph in graphs])
    categories = [[parse(name)[0] for name in graph.objects] for graph in graphs]  # without colours
    twins = np.array([len(set(names)) < len(names) for names in categories])
    rows: dict[str, np.ndarray] = {"all": np.ones(len(graphs), bool)}
    for low, high in NUMBERS:
        name = {1: f"up to {high}", high: str(high)}.get(low, f"{low} or more")
        rows[f"{name} objects"] = (sizes >= low) & (sizes <= high)
    rows |= {"two of a kind": twins, "none of a kind twice": ~twins}
    table = {}
    for name, some in rows.items():
        if some.any():
            share = bootstrap.estimate(np.asarray(faultless_SG, float)[:, some])
            table[name] = {"graphs": int(some.sum()), "share": share.mean, "low": share.low, "high": share.high}
    return table


def merged(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Tables of several sets of pictures side by side, an interval in a cell, for printing."""
    rows: dict[str, dict[str, Any]] = {}
    for column, table in tables.items():
        for name, cell in table.items():
            row = rows.setdefault(name, {"graphs": cell["graphs"]})
            row[column] = f"{cell['share']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    return rows
