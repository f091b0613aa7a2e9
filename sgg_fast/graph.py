"""Shared types: a scene graph, a packed batch of scene graphs, and the table of their words.

File formats are in `sgg_fast/data/formats.py`, modules with parameters in `sgg_fast/nn`.

Letters: B graphs, N objects and E relations of the batch, packed without padding.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:  # only batches need torch, and its import takes seconds
    import torch

IMAGE_OBJECT = "__image__"
"""Name of the image node, which represents the whole picture (sg2im's convention)."""

IN_IMAGE = "__in_image__"
"""Predicate of the relation from every object to the image node."""

SPOKEN = {IMAGE_OBJECT: "image", IN_IMAGE: "in image"}
"""Text of the two reserved names for the text tower."""


class SceneGraphError(ValueError):
    """A scene graph that cannot be used; the message names source, place and reason."""


def shown(value: object) -> str:
    """A short text for a value of any size and depth, for an error message."""
    if isinstance(value, (list, tuple, dict)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number too large"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def plain(text: str) -> str:
    """`text` with control and invisible characters (ESC, bidi marks, lone surrogates) escaped for a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def check_name(name: object, where: str) -> None:
    """Raise `SceneGraphError`, beginning with `where`, for a reserved name or one that the text tower cannot read."""
    if not isinstance(name, str) or not name.strip():
        raise SceneGraphError(f"{where}: a name must be a non-empty string, not {shown(name)}")
    if name.strip() in SPOKEN:
        raise SceneGraphError(f"{where}: {name!r} is added by the model itself; leave it out")
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise SceneGraphError(f"{where}: the name holds a lone surrogate, which is not text")


def check_index(index: object, num_objects: int, where: str) -> None:
    """Raise `SceneGraphError`, beginning with `where`, unless `index` is an integer in 0..num_objects - 1."""
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
        raise SceneGraphError(f"{where}: an object index must be an integer, not {shown(index)}")
    if not 0 <= index < num_objects:
        raise SceneGraphError(f"{where}: object index {shown(int(index))}, but the graph has {num_objects} objects")


@dataclasses.dataclass(frozen=True)
class SceneGraph:
    """Objects by name and relations as (subject index, predicate, object index).

    Attributes go in front of the name: "red hat". Packing adds the image node.
    Raises `SceneGraphError` for an empty graph, a name that is empty or reserved, an index out of range or a self-loop.
    """

    objects: tuple[str, ...]
    relations: tuple[tuple[int, str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.objects:
            raise SceneGraphError("a scene graph needs at least one object")
        for i, name in enumerate(self.objects):
            check_name(name, f"objects[{i}]")
        for i, relation in enumerate(self.relations):
            if not isinstance(relation, (tuple, list)) or len(relation) != 3:
                raise SceneGraphError(f"relationships[{i}]: must be (subject, predicate, object)")
            subject, predicate, obj = relation
            for index in (subject, obj):
                check_index(index, len(self.objects), f"relationships[{i}]")
            check_name(predicate, f"relationships[{i}]")
            if subject == obj:
                raise SceneGraphError(f"relationships[{i}]: object {subject} is related to itself")

    @property
    def names(self) -> list[str]:
        """Every word of the graph, objects first, repeats kept."""
        return [*self.objects, *(predicate for _, predicate, _ in self.relations)]


class Phrases(Sequence[str]):
    """Phrases made of a table's names, put together when they are read: "subject predicate object", or one name."""

    def __init__(self, names: Sequence[str], rows_P3: np.ndarray) -> None:
        self.names, self.rows_P3 = names, rows_P3

    def __len__(self) -> int:
        return len(self.rows_P3)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Phrases: ...

    def __getitem__(self, index: int | slice) -> str | Phrases:
        if isinstance(index, slice):
            return Phrases(self.names, self.rows_P3[index])
        said = (self.names[i] for i in self.rows_P3[index].tolist() if i >= 0)
        return " ".join(SPOKEN.get(name, name) for name in said)


class NameTable:
    """Distinct strings and their ids (the two reserved names are 0 and 1), and phrases made of these strings.

    Object and predicate names share one table, because the text tower embeds strings, not roles. `stored`: the names of
    a table in id order, taken as they are (their ids are looked up once a name is asked for), and its phrases.
    """

    def __init__(
        self, names: Iterable[str] = (), stored: Sequence[str] | None = None, phrase_rows: np.ndarray | None = None
    ) -> None:
        self.names: Sequence[str] = [IMAGE_OBJECT, IN_IMAGE] if stored is None else stored
        self._phrase_rows = np.empty((0, 3), np.int32) if phrase_rows is None else phrase_rows
        self._known: dict[str, int] | None = None
        for name in names:
            self.add(name)

    @property
    def _ids(self) -> dict[str, int]:
        if self._known is None:
            self._known = {name: i for i, name in enumerate(self.names)}
        return self._known

    @property
    def phrases(self) -> Phrases:
        """The phrases in id order."""
        return Phrases(self.names, self._phrase_rows)

    def add(self, name: str) -> int:
        """Id of `name`; a new name is added."""
        found = self._ids.get(name)
        if found is None:
            if not isinstance(self.names, list):
                self.names = list(self.names)
            found = self._ids[name] = len(self.names)
            self.names.append(name)
        return found

    def add_phrases(self, rows_E3: np.ndarray) -> np.ndarray:
        """Ids [E] of phrases given by the ids of their names, -1 for none; new ones are added in order."""
        rows = np.concatenate([self._phrase_rows, rows_E3.astype(np.int32, copy=False)])
        base = len(self.names) + 1  # one key a phrase, by pairs, so that no key exceeds 64 bits
        _, pair = np.unique((rows[:, 0] + 1).astype(np.int64) * base + rows[:, 1] + 1, return_inverse=True)
        _, first, found = np.unique(pair * base + rows[:, 2] + 1, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        kept = len(self._phrase_rows)
        self._phrase_rows = rows[first[order]]
        return rank[found[kept:]]

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def spoken(self) -> Sequence[str]:
        """The strings for the text tower, in id order."""
        return Phrases(self.names, np.arange(len(self.names), dtype=np.int32)[:, None])


class GraphPacker:
    """Collects graphs in flat buffers of integers, four bytes each; the graphs themselves are not kept."""

    def __init__(self, table: NameTable) -> None:
        self.table = table
        self._buffers = {name: array("i") for name in ("object_name", "predicate_name", "subject", "object", "sizes")}
        self._image, self._in_image = table.add(IMAGE_OBJECT), table.add(IN_IMAGE)

    def __len__(self) -> int:
        return len(self._buffers["sizes"]) // 2

    def add(self, graph: SceneGraph) -> None:
        """Append a graph with its image node and the relations to it, and enter its names in the table."""
        names, predicates, subjects, objects, sizes = self._buffers.values()
        offset, num, add = len(names), len(graph.objects), self.table.add
        names.extend([*map(add, graph.objects), self._image])
        predicates.extend([*(add(p) for _, p, _ in graph.relations), *[self._in_image] * num])
        subjects.extend([*(offset + s for s, _, _ in graph.relations), *range(offset, offset + num)])
        objects.extend([*(offset + o for _, _, o in graph.relations), *[offset + num] * num])
        sizes.extend((num + 1, len(graph.relations) + num))

    def arrays(self) -> dict[str, np.ndarray]:
        """The integers so far, int32, without a copy: names [N], predicates, subjects and objects [E], sizes [B, 2],
        object_ptr and relation_ptr [B + 1]."""
        found = {name: np.frombuffer(buffer, np.int32) for name, buffer in self._buffers.items() if len(buffer)}
        found = {name: found.get(name, np.empty(0, np.int32)) for name in self._buffers}
        sizes = found["sizes"] = found["sizes"].reshape(-1, 2)
        for k, name in enumerate(("object_ptr", "relation_ptr")):
            found[name] = np.concatenate([[0], np.cumsum(sizes[:, k], dtype=np.int64)])
        return found

    def batch(self) -> SceneGraphBatch:
        """The packed graphs, with their phrases in the table. Raises `SceneGraphError` without a graph."""
        if not len(self):
            raise SceneGraphError("no scene graph to pack")
        found = self.arrays()
        names, said, subject, other = (found[k] for k in ("object_name", "predicate_name", "subject", "object"))
        rows_E3 = np.stack([names[subject], said, names[other]], axis=1)
        rows_E3[rows_E3[:, 2] == self._image, 1:] = -1  # an object's relation to the image: its name alone
        phrases = self.table.add_phrases(rows_E3)
        return SceneGraphBatch.from_arrays(names, said, subject, other, found["sizes"], phrases)


_TENSORS = (
    "object_name",
    "predicate_name",
    "phrase",
    "subject",
    "object",
    "object_ptr",
    "relation_ptr",
    "message_ptr",
    "message_mid",
    "message_slot",
    "object_graph",
    "relation_graph",
    "object_pooled",
    "relation_pooled",
)


@dataclasses.dataclass(frozen=True)
class SceneGraphBatch:
    """B packed graphs, with a precomputed aggregation plan for every object (CSR form).

    Within a graph the image node is the last object, and its `__in_image__` relations, one from every other object in
    order, are the last relations. A packed data set is the store from which `sgg_fast.ops.pack` draws batches. All
    tensors are int32 on one device unless noted.
    """

    object_name: torch.Tensor
    """[N] id of each object's name in the `NameTable`."""
    predicate_name: torch.Tensor
    """[E] id of each relation's predicate."""
    phrase: torch.Tensor
    """[E] id of each relation's phrase "subject predicate object" in the table; the phrase of an image relation is the
    name of its object."""
    subject: torch.Tensor
    """[E] packed index of the subject."""
    object: torch.Tensor
    """[E] packed index of the object."""
    object_ptr: torch.Tensor
    """[B+1]; graph b owns the objects object_ptr[b] .. object_ptr[b+1]."""
    relation_ptr: torch.Tensor
    """[B+1]; graph b owns the relations relation_ptr[b] .. relation_ptr[b+1]."""
    message_ptr: torch.Tensor
    """[N+1]; object i receives the messages message_slot[message_ptr[i] .. message_ptr[i+1]]."""
    message_mid: torch.Tensor
    """[N] first slot of object i as object; it is the subject in the slots before."""
    message_slot: torch.Tensor
    """[2E] packed index of each message's relation, ascending within a role."""
    object_graph: torch.Tensor
    """[N] the graph of each object."""
    relation_graph: torch.Tensor
    """[E] the graph of each relation."""
    object_pooled: torch.Tensor
    """[N] uint8, 0 for image nodes, which are not pooled and never masked."""
    relation_pooled: torch.Tensor
    """[E] uint8, 0 for `__in_image__` relations."""
    sizes: np.ndarray
    """[B, 2] int64 on the host: objects and relations of each graph, so that no size is read back. Upper bounds in a
    batch of `sgg_fast.ops.pack_captured`."""

    @property
    def num_graphs(self) -> int:
        """B."""
        return len(self.sizes)

    @property
    def num_objects(self) -> int:
        """N, image nodes included."""
        return self.object_name.shape[0]

    @property
    def num_relations(self) -> int:
        """E, image relations included."""
        return self.predicate_name.shape[0]

    @property
    def plan(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ptr, mid, slot) for `sgg_fast.ops.scatter_mean`."""
        return self.message_ptr, self.message_mid, self.message_slot

    def to(self, device: torch.device | str) -> SceneGraphBatch:
        """The same batch on `device`."""
        import torch

        later = torch.device(device).type == "cuda"  # a copy to the host must be complete before it is read
        moved = {name: getattr(self, name).to(device, non_blocking=later) for name in _TENSORS}
        return dataclasses.replace(self, **moved)

    def with_bare(self) -> SceneGraphBatch:
        """2B graphs: all graphs, then all graphs with only their relations to the image node."""
        device, num = self.object_name.device, self.num_objects
        names, predicates, phrases, subject, object_ = (
            getattr(self, name).cpu().numpy()
            for name in ("object_name", "predicate_name", "phrase", "subject", "object")
        )
        bare = self.relation_pooled.cpu().numpy() == 0
        sizes = np.stack([self.sizes[:, 0], self.sizes[:, 0] - 1], axis=1)
        doubled = SceneGraphBatch.from_arrays(
            np.concatenate([names, names]),
            np.concatenate([predicates, predicates[bare]]),
            np.concatenate([subject, subject[bare] + num]),
            np.concatenate([object_, object_[bare] + num]),
            np.concatenate([self.sizes, sizes]),
            np.concatenate([phrases, phrases[bare]]),
        )
        return doubled.to(device)

    @classmethod
    def from_graphs(cls, graphs: Iterable[SceneGraph], table: NameTable) -> SceneGraphBatch:
        """Pack `graphs` and add their names to `table`. Linear in the size of the graphs."""
        packer = GraphPacker(table)
        for graph in graphs:
            packer.add(graph)
        return packer.batch()

    @classmethod
    def from_arrays(
        cls,
        names: np.ndarray,
        predicates: np.ndarray,
        subject: np.ndarray,
        object_: np.ndarray,
        sizes: np.ndarray,
        phrases: np.ndarray | None = None,
    ) -> SceneGraphBatch:
        """Build the plan from packed indices; image nodes and their relations must be included.

        names [N], predicates [E]; subject [E], object_ [E] packed indices; sizes [B, 2] objects and relations;
        phrases [E] (zeros without text initialisation).
        Raises ValueError for sizes that do not add up and for a relation that leaves its graph.
        """
        import torch

        num_objects, num_relations = len(names), len(predicates)
        object_ptr, relation_ptr = (np.concatenate([[0], np.cumsum(sizes[:, k])]) for k in (0, 1))
        if (object_ptr[-1], relation_ptr[-1]) != (num_objects, num_relations):
            raise ValueError(
                f"sizes add up to {object_ptr[-1]}, {relation_ptr[-1]}, not {num_objects}, {num_relations}"
            )
        object_graph = np.repeat(np.arange(len(sizes)), sizes[:, 0])
        relation_graph = np.repeat(np.arange(len(sizes)), sizes[:, 1])
        for role, index in (("subject", subject), ("object", object_)):
            strays = (index < object_ptr[relation_graph]) | (index >= object_ptr[relation_graph + 1])
            if strays.any():
                e = int(strays.argmax())
                raise ValueError(f"relation {e}: {role} {index[e]} is not an object of graph {relation_graph[e]}")
        as_subject = np.bincount(subject, minlength=num_objects)
        degree = as_subject + np.bincount(object_, minlength=num_objects)
        message_ptr = np.concatenate([[0], np.cumsum(degree)])
        # A stable sort by (object, role) keeps relations ascending within a role.
        ends = np.concatenate([subject, object_]).astype(np.int64)
        ends *= 2
        ends[num_relations:] += 1
        order = np.argsort(ends, kind="stable")
        num_real = sizes[:, 1] - (sizes[:, 0] - 1)
        pooled = np.ones(num_objects, np.uint8)
        pooled[object_ptr[1:] - 1] = 0
        relation_pooled = np.arange(num_relations) - relation_ptr[relation_graph] < num_real[relation_graph]

        def int32(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array.astype(np.int32))

        return cls(
            object_name=int32(names),
            predicate_name=int32(predicates),
            phrase=int32(np.zeros(num_relations) if phrases is None else phrases),
            subject=int32(subject),
            object=int32(object_),
            object_ptr=int32(object_ptr),
            relation_ptr=int32(relation_ptr),
            message_ptr=int32(message_ptr),
            message_mid=int32(message_ptr[:-1] + as_subject),
            message_slot=int32(order % max(num_relations, 1)),
            object_graph=int32(object_graph),
            relation_graph=int32(relation_graph),
            object_pooled=torch.from_numpy(pooled),
            relation_pooled=torch.from_numpy(relation_pooled.astype(np.uint8)),
            sizes=np.asarray(sizes, dtype=np.int64),
        )
