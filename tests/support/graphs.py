"""Small scene graphs for tests, the awkward ones among them, random embeddings of their words, and instances."""

from __future__ import annotations

import numpy as np
import torch

from sgg_fast.eval.detector import Instance
from sgg_fast.graph import IMAGE_OBJECT, IN_IMAGE, NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.toy.world import Scene

GRAPHS = {
    "chain": SceneGraph(("sheep", "grass", "sky"), ((0, "standing on", 1), (2, "above", 1))),
    "isolated": SceneGraph(("sky", "red hat", "grass", "rock"), ((0, "above", 2),)),
    "no_relations": SceneGraph(("tree", "house")),
    "duplicates": SceneGraph(("sheep", "sheep", "grass"), ((0, "left of", 1), (1, "left of", 0), (1, "on", 2))),
    "one_object": SceneGraph(("boat",)),
    "parallel": SceneGraph(("person", "horse"), ((0, "riding", 1), (0, "above", 1), (1, "below", 0))),
    "hub": SceneGraph(("sea", *["boat"] * 5), tuple((i, "on", 0) for i in range(1, 6))),
}
"""By what is special about each."""


def all_graphs() -> list[SceneGraph]:
    """Every graph of `GRAPHS`, in order."""
    return list(GRAPHS.values())


def pack(*graphs: SceneGraph, table: NameTable | None = None) -> tuple[SceneGraphBatch, NameTable]:
    """The packed batch of `graphs`, and the table that its ids refer to."""
    table = NameTable() if table is None else table
    return SceneGraphBatch.from_graphs(list(graphs), table), table


def shared_table() -> NameTable:
    """One table for every graph of `GRAPHS`, so that ids agree between batches."""
    return NameTable(name for graph in all_graphs() for name in graph.names)


def embeddings(table: NameTable, width: int, seed: int = 0) -> torch.Tensor:
    """[V, width] random unit-variance embeddings of the words of `table`."""
    return torch.randn(len(table), width, generator=torch.Generator().manual_seed(seed))


def by_name(table: NameTable, values_VD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Word -> its row in float64."""
    return {name: values_VD[i].double() for i, name in enumerate(table.names)}


def clip_like(num: int, width: int, cosine: float, seed: int = 0) -> torch.Tensor:
    """[num, width] unit vectors of pairwise cosine about `cosine`, as CLIP's text embeddings of nouns have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    own = torch.nn.functional.normalize(torch.randn(num, width, generator=generator), dim=1)
    own = torch.nn.functional.normalize(own - (own @ common)[:, None] * common, dim=1)
    return cosine**0.5 * common + (1 - cosine) ** 0.5 * own


def nodes(graph: SceneGraph) -> list[str]:
    """Object names with the image node at the end, as the model sees them."""
    return [*graph.objects, IMAGE_OBJECT]


def triples(graph: SceneGraph) -> list[tuple[int, str, int]]:
    """Relations with one `__in_image__` from every object at the end, as the model sees them."""
    image = len(graph.objects)
    return [*graph.relations, *((i, IN_IMAGE, image) for i in range(image))]


def parse(name: str) -> tuple[str, str | None]:
    """Category and colour of a name, as the toy's detector reads it."""
    words = name.split()
    return words[-1], words[0] if len(words) > 1 else None


def thing(
    category: str, x0: float, y0: float, x1: float, y1: float, colour: str | None = None, sure: float = 1.0
) -> Instance:
    """An instance without a mask."""
    return Instance(category, colour, np.array([x0, y0, x1, y1], np.float32), None, sure)


def true_instances(scene: Scene) -> list[Instance]:
    """What a detector without error finds in a scene of the toy, one instance an object."""
    return [
        Instance(*parse(name), box, mask, 1.0)
        for name, box, mask in zip(scene.graph.objects, scene.boxes, scene.masks, strict=True)
    ]
