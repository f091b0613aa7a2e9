"""Shared types: a scene graph, a packed batch of scene graphs, and the table of their words.

File formats are in `sgg_fast/data/formats.py`, modules with parameters in `sgg_fast/nn`.

Letters: B graphs, N objects and E relations of the batch, packed without padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

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
    if any("\ud800" <= character <= "\udfff" for character in name):
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


class NameTable:
    """Distinct strings and their ids (the two reserved names are 0 and 1), and phrases made of these strings.

    Object and predicate names share one table, because the text tower embeds strings, not roles.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: list[str] = [IMAGE_OBJECT, IN_IMAGE]
        self.phrases: list[str] = []
        self._ids = {name: i for i, name in enumerate(self.names)}
        self._phrase_ids: dict[tuple[int, ...], int] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> int:
        """Id of `name`; a new name is added."""
        if name not in self._ids:
            self._ids[name] = len(self.names)
            self.names.append(name)
        return self._ids[name]

    def add_phrase(self, *name_ids: int) -> int:
        """Id of the phrase of these names, in order; a new phrase is added."""
        if name_ids not in self._phrase_ids:
            self._phrase_ids[name_ids] = len(self.phrases)
            self.phrases.append(" ".join(SPOKEN.get(self.names[i], self.names[i]) for i in name_ids))
        return self._phrase_ids[name_ids]

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def spoken(self) -> list[str]:
        """The strings for the text tower, in id order."""
        return [SPOKEN.get(name, name) for name in self.names]


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
    def from_graphs(cls, graphs: Sequence[SceneGraph], table: NameTable) -> SceneGraphBatch:
        """Pack `graphs` and add their names to `table`. Linear in the size of the graphs."""
        if not graphs:
            raise SceneGraphError("no scene graph to pack")
        names, predicates, subjects, objects, sizes = [], [], [], [], []
        phrases: list[int] = []
        offset = 0
        for graph in graphs:
            num = len(graph.objects)
            own = [table.add(name) for name in graph.objects]
            said = [table.add(p) for _, p, _ in graph.relations]
            names += [*own, table.add(IMAGE_OBJECT)]
            predicates += said + [table.add(IN_IMAGE)] * num
            phrases += [table.add_phrase(own[s], p, own[o]) for p, (s, _, o) in zip(said, graph.relations, strict=True)]
            phrases += [table.add_phrase(name) for name in own]
            subjects += [offset + s for s, _, _ in graph.relations] + list(range(offset, offset + num))
            objects += [offset + o for _, _, o in graph.relations] + [offset + num] * num
            sizes.append((num + 1, len(graph.relations) + num))
            offset += num + 1
        arrays = (np.asarray(ids) for ids in (names, predicates, subjects, objects, sizes, phrases))
        return cls.from_arrays(*arrays)

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
        order = np.argsort(np.concatenate([2 * subject, 2 * object_ + 1]), kind="stable")
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
