"""Readers of the published scene graph layouts: sg2im, Visual Genome, LAION-SG, GQA, PSG, plain triples.

The content of each graph decides its layout. `sgg_fast/data/formats.py` reads files and JSON,
`sgg_fast/data/text_form.py` the one-line form.

    sg2im          {"objects": ["sheep", "grass"], "relationships": [[0, "on", 1]]}
    Visual Genome  {"image_id": 1, "objects": [{"object_id": 5, "names": ["sheep"], "attributes": ["white"]}],
                    "relationships": [{"subject": {"object_id": 5, "name": "sheep"}, "predicate": "ON", "object": {}}]}
                   objects.json, attributes.json (where the first key is "attributes"; "object_names" in 1.0),
                   relationships.json, and scene_graphs.json, which has "subject_id" and "object_id", as have
                   region_graphs.json, where a graph is a region
    LAION-SG       {"img_id": "1", "items": [{"item_id": 0, "label": "sheep", "attributes": ["white"]}],
                    "relations": [{"item1": 0, "relation": "on", "item2": 1}]}
    GQA            {"7": {"objects": {"5": {"name": "sheep", "attributes": ["white"],
                                            "relations": [{"name": "on", "object": "6"}]}}}}

    PSG            {"thing_classes": ["sheep"], "stuff_classes": ["grass"], "predicate_classes": ["on"],
                    "data": [{"segments_info": [{"category_id": 0}, {"category_id": 1}], "relations": [[0, 1, 0]]}]}
    triples        [["sheep", "on", "grass"], ["sky", "above", "grass"]] or [{"subject": "sheep", "predicate": "on",
                    "object": "grass"}]; a name is one object
    VRD            names objects by number only; refused, because the names are in other files

Attributes go in front of the name: "white sheep".
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from sgg_fast.graph import IMAGE_OBJECT, IN_IMAGE, SceneGraph, SceneGraphError, check_index, check_name, shown

logger = logging.getLogger(__name__)

MAX_SIZE = 4096
"""Most objects and relations of one graph; every pixel attends to a token for each."""
MAX_NAME = 200
"""Most characters of a name or predicate; CLIP reads about 70 words."""


class Notices:
    """Warnings about skipped parts of one document: the first `most` in full, the others as a count."""

    def __init__(self, source: str, most: int = 5) -> None:
        self.source, self.most, self.num = source, most, 0

    def add(self, where: str, reason: str) -> None:
        self.num += 1
        if self.num <= self.most:
            logger.warning("%s: left out: %s", where, reason)

    def close(self) -> None:
        """Log the number of unlogged warnings."""
        if self.num > self.most:
            logger.warning("%s: %d more left out for such reasons", self.source, self.num - self.most)


def clean_name(name: Any, where: str) -> str:
    """A name or predicate with single spaces. Raises `SceneGraphError` that begins with `where`."""
    check_name(name, where)
    if len(name) > MAX_NAME:
        raise SceneGraphError(f"{where}: a name of {len(name)} characters; at most {MAX_NAME}")
    name = " ".join(name.split())
    if not name.isprintable() and any(unicodedata.category(character) == "Cc" for character in name):
        raise SceneGraphError(f"{where}: the name holds a control character, which is not text")
    return name


class _Draft:
    """A partly read graph; `where` is the place of the graph, as a prefix of a key."""

    def __init__(self, where: str, notices: Notices) -> None:
        self.where, self.notices = where, notices
        self.names: list[str] = []
        self.index: dict[Any, int] = {}
        self.relations: dict[tuple[int, str, int], None] = {}

    def at(self, place: str) -> str:
        return f"{self.where}{place}"

    def _room(self, place: str) -> None:
        if len(self.names) + len(self.relations) >= MAX_SIZE:
            raise SceneGraphError(f"{self.at(place)}: more than {MAX_SIZE} objects and relations in one graph")

    def add_object(self, name: Any, place: str) -> int:
        self._room(place)
        self.names.append(clean_name(name, self.at(place)))
        return len(self.names) - 1

    def add_identified(self, key: Any, name: Any, place: str) -> None:
        """Add an object with an id; a repeated id, which published files contain, is skipped."""
        if self.key(key, place) in self.index:
            self.notices.add(self.at(place), f"a second object with id {shown(key)}")
        else:
            self.index[key] = self.add_object(name, place)

    def key(self, key: Any, place: str) -> Any:
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise SceneGraphError(f"{self.at(place)}: an object's id must be an integer or a string, not {shown(key)}")
        return key

    def find(self, key: Any, place: str) -> int:
        if self.key(key, place) not in self.index:
            raise SceneGraphError(f"{self.at(place)}: there is no object with id {shown(key)} in the graph")
        return self.index[key]

    def relate(self, subject: int, predicate: Any, obj: int, place: str, lower: bool = False) -> None:
        self._room(place)
        predicate = clean_name(predicate, self.at(place))
        triple = (subject, predicate.lower() if lower else predicate, obj)
        if subject == obj:
            self.notices.add(self.at(place), f"object {subject} is related to itself")
        elif triple in self.relations:
            self.notices.add(self.at(place), "an exact duplicate")
        else:
            self.relations[triple] = None

    def entries(self, holder: dict, key: str, what: str, place: str = "") -> Iterator[tuple[str, Any]]:
        """(place, entry) of the list `holder[key]`; no entries if the key is absent."""
        entries = holder.get(key, [])
        if not isinstance(entries, list):
            raise SceneGraphError(f"{self.at(place + key)}: must be a list of {what}")
        for i, entry in enumerate(entries):
            yield f"{place}{key}[{i}]", entry

    def records(self, holder: dict, key: str, place: str = "") -> Iterator[tuple[str, dict]]:
        """(place, record) of the list `holder[key]`; a null stands for an empty list in published files."""
        if holder.get(key) is not None:
            for at, entry in self.entries(holder, key, "objects in braces", place):
                yield at, self.record(entry, at)

    def record(self, entry: Any, place: str) -> dict:
        if not isinstance(entry, dict):
            raise SceneGraphError(f"{self.at(place)}: must be an object in braces, not {shown(entry)}")
        return entry

    def described(self, record: dict, name: Any, place: str) -> Any:
        """`name` with the record's attributes in front."""
        name = clean_name(name, self.at(place))
        if record.get("attributes") is None:
            return name
        words = [clean_name(word, self.at(at)) for at, word in self.entries(record, "attributes", "words", f"{place}.")]
        return " ".join([*words, name])

    def graph(self) -> SceneGraph:
        return SceneGraph(tuple(self.names), tuple(self.relations))


Reader = Callable[[Any, _Draft], None]


def _sg2im(graph: dict, draft: _Draft) -> None:
    names = graph.get("objects")
    if not isinstance(names, list) or not names:
        raise SceneGraphError(f"{draft.at('objects')}: must be a non-empty list of names")
    # sg2im's files may hold the image node, which packing adds.
    is_image = [isinstance(name, str) and name.strip() == IMAGE_OBJECT for name in names]
    place_of: list[int | None] = [
        None if image else draft.add_object(name, place)
        for image, (place, name) in zip(is_image, draft.entries(graph, "objects", "names"), strict=True)
    ]
    form = "[subject, predicate, object]"
    for place, relation in draft.entries(graph, "relationships", form):
        if not isinstance(relation, list) or len(relation) != 3:
            raise SceneGraphError(f"{draft.at(place)}: must be {form}")
        subject, predicate, obj = relation
        for index in (subject, obj):
            check_index(index, len(names), draft.at(place))
        if predicate == IN_IMAGE and is_image[obj]:
            continue
        ends = place_of[subject], place_of[obj]
        if ends[0] is None or ends[1] is None:
            raise SceneGraphError(f"{draft.at(place)}: relates {IMAGE_OBJECT} by another predicate than {IN_IMAGE}")
        draft.relate(ends[0], predicate, ends[1], place)


def _triples(graph: list, draft: _Draft) -> None:
    """Read triples of words; equal names are one object."""

    def end(name: Any, place: str) -> int:
        name = clean_name(name, draft.at(place))
        if name not in draft.index:
            draft.index[name] = draft.add_object(name, place)
        return draft.index[name]

    for i, triple in enumerate(graph):
        place = f"[{i}]"
        subject, predicate, obj = triple if isinstance(triple, list) else _words(triple)
        ends = end(subject, place), end(obj, place)
        if ends[0] == ends[1]:
            raise SceneGraphError(
                f"{draft.at(place)}: {shown(subject)} is related to itself; of two things of one name say which by "
                '{"objects": [...], "relationships": [[0, "on", 1]]}'
            )
        draft.relate(ends[0], predicate, ends[1], place)


def _words(triple: dict) -> tuple[Any, Any, Any]:
    """Subject, predicate and object of a triple in the form of a JSON object."""
    return triple.get("subject"), triple.get("predicate", triple.get("relation")), triple.get("object")


def _are_triples(graph: Any) -> bool:
    """True for a list of triples of words, each a list or a JSON object."""

    def is_triple(entry: Any) -> bool:
        three = entry if isinstance(entry, list) else _words(entry) if isinstance(entry, dict) else ()
        return len(three) == 3 and all(isinstance(word, str) for word in three)

    return isinstance(graph, list) and bool(graph) and all(map(is_triple, graph))


def _visual_genome(graph: dict, draft: _Draft) -> None:
    def name_of(record: dict, place: str) -> Any:
        names = record.get("names", record.get("object_names"))
        name = names[0] if isinstance(names, list) and names else record.get("name")
        return draft.described(record, name.lower() if isinstance(name, str) else name, place)

    for key in ("objects", "attributes"):
        for place, record in draft.records(graph, key):
            draft.add_identified(record.get("object_id", record.get("id")), name_of(record, place), place)
    for place, relation in draft.records(graph, "relationships"):
        ends = []
        for role in ("subject", "object"):
            inline, at = relation.get(role), f"{place}.{role}"
            if inline is None:
                ends.append(draft.find(relation.get(f"{role}_id"), f"{at}_id"))
                continue
            inline = draft.record(inline, at)
            key = draft.key(inline.get("object_id", inline.get("id")), at)
            if key not in draft.index:
                draft.add_identified(key, name_of(inline, at), at)
            ends.append(draft.index[key])
        if relation.get("predicate") == "":
            draft.notices.add(draft.at(place), "it has no predicate")
        else:
            draft.relate(ends[0], relation.get("predicate"), ends[1], place, lower=True)


def _laion_sg(graph: dict, draft: _Draft) -> None:
    for place, item in draft.records(graph, "items"):
        draft.add_identified(item.get("item_id"), draft.described(item, item.get("label"), place), place)
    for place, relation in draft.records(graph, "relations"):
        subject, obj = (draft.find(relation.get(key), f"{place}.{key}") for key in ("item1", "item2"))
        draft.relate(subject, relation.get("relation"), obj, place)


def _gqa(graph: dict, draft: _Draft) -> None:
    objects = [(key, f"objects[{shown(key)}]", record) for key, record in graph["objects"].items()]
    for key, place, record in objects:
        record = draft.record(record, place)
        draft.add_identified(key, draft.described(record, record.get("name"), place), place)
    for key, place, record in objects:
        relations = record.get("relations")
        # A list in the published files, an object in their description.
        relations = list(relations.values()) if isinstance(relations, dict) else relations
        for at, relation in draft.records({"relations": relations}, "relations", f"{place}."):
            obj = draft.find(relation.get("object"), f"{at}.object")
            draft.relate(draft.index[key], relation.get("name"), obj, at)


_PSG_LISTS = ("thing_classes", "stuff_classes", "predicate_classes")


def _psg(document: dict) -> Reader:
    """The reader of a PSG file's records, which name objects and predicates by index in the file's class lists."""

    lists = {key: found if isinstance(found := document.get(key), list) else [] for key in _PSG_LISTS}
    things = "thing_classes, stuff_classes"
    known = {things: lists["thing_classes"] + lists["stuff_classes"],
             "predicate_classes": lists["predicate_classes"]}  # fmt: skip

    def name_of(key: str, index: Any, place: str, draft: _Draft) -> Any:
        names = known[key]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(names):
            raise SceneGraphError(f"{draft.at(place)}: {shown(index)} is no index of the file's {key}")
        return names[index]

    def read(graph: dict, draft: _Draft) -> None:
        for place, segment in draft.records(graph, "segments_info"):
            draft.add_object(name_of(things, segment.get("category_id"), place, draft), place)
        form = "[subject, object, predicate]"
        for place, relation in draft.entries(graph, "relations", form):
            if not isinstance(relation, list) or len(relation) != 3:
                raise SceneGraphError(f"{draft.at(place)}: must be {form}")
            for index in relation[:2]:
                check_index(index, len(draft.names), draft.at(place))
            predicate = name_of("predicate_classes", relation[2], place, draft)
            draft.relate(relation[0], predicate, relation[1], place)

    return read


_VG_LISTS = ("objects", "attributes", "relationships")
_KNOWN = 'a graph must be an object with "objects" and "relationships", or a list of triples'


def _layout(graph: Any, where: str) -> Reader:
    """The reader of a graph, by its content. Raises `SceneGraphError` for an unknown layout."""
    if _are_triples(graph):
        return _triples
    if not isinstance(graph, dict):
        raise SceneGraphError(f"{where}: {_KNOWN}")
    if "segments_info" in graph and "objects" not in graph:
        raise SceneGraphError(f"{where}: a record of PSG, whose names are in the lists of its file; give that file")
    if _is_vrd(graph):
        raise SceneGraphError(
            f"{where}: in VRD's format, which names things by number; put the words of VRD's objects.json and "
            'predicates.json in their place, as {"objects": ["sheep", "grass"], "relationships": [[0, "on", 1]]}'
        )
    if "items" in graph and "objects" not in graph:
        return _laion_sg
    if isinstance(graph.get("objects"), dict):
        return _gqa
    lists = [graph[key] for key in _VG_LISTS if isinstance(graph.get(key), list)]
    first = next((entries[0] for entries in lists if entries), None)
    empty = bool(lists) and first is None and not graph.keys().isdisjoint(("image_id", "id", "region_id"))
    return _visual_genome if isinstance(first, dict) or empty else _sg2im


def _is_vrd(document: dict) -> bool:
    """True for a dictionary from image to relations between numbered categories, or for such a relation."""
    rows = [row for value in document.values() if isinstance(value, list) for row in value] or [document]
    return all(
        isinstance(row, dict) and isinstance(row.get("subject"), dict) and "category" in row["subject"] for row in rows
    )


def _read(graph: Any, source: str, path: str, notices: Notices, reader: Reader | None) -> SceneGraph | None:
    """The graph at `path` of the document; None for a published record without objects, which is skipped."""
    where = f"{source}: {path}" if path else source
    reader = reader or _layout(graph, where)
    if not isinstance(graph, list if reader is _triples else dict):
        raise SceneGraphError(f"{where}: {_KNOWN}")
    draft = _Draft(f"{source}: {path}{'' if reader is _triples else '.'}" if path else f"{source}: ", notices)
    reader(graph, draft)
    if not draft.names:
        notices.add(where, "a graph without objects")
        return None
    return draft.graph()


def _is_gqa_file(document: Any) -> bool:
    """True for a dictionary from image id to GQA graph."""
    values = list(document.values()) if isinstance(document, dict) else []
    return bool(values) and all(isinstance(v, dict) and isinstance(v.get("objects"), dict) for v in values)


def _parts(document: Any) -> tuple[list[tuple[str, Any]], Reader | None]:
    """(place, graph) of every graph of a document, and their reader if the document determines it."""
    reader = None
    if isinstance(document, dict) and "predicate_classes" in document and isinstance(document.get("data"), list):
        reader = _psg(document)
        parts = [(f"data[{i}]", graph) for i, graph in enumerate(document["data"])]
    elif isinstance(document, list) and not _are_triples(document):
        parts = [(f"[{i}]", graph) for i, graph in enumerate(document)]
    elif _is_gqa_file(document):
        parts = [(f"[{shown(key)}]", graph) for key, graph in document.items()]
    else:
        parts = [("", document)]
    return [inner for part in parts for inner in _regions(*part)], reader


def _regions(path: str, graph: Any) -> list[tuple[str, Any]]:
    """The regions of a record of Visual Genome's region_graphs.json; for any other graph the graph alone."""
    regions = graph.get("regions") if isinstance(graph, dict) and "objects" not in graph else None
    if not isinstance(regions, list):
        return [(path, graph)]
    return [(f"{path}.regions[{k}]".removeprefix("."), region) for k, region in enumerate(regions)]


def read_document(document: Any, source: str) -> list[SceneGraph]:
    """All graphs of a parsed JSON document of any layout with one or several graphs; `document` is not modified.

    Self-loops, exact duplicates, repeated ids, empty predicates and graphs without objects occur in published files;
    they are skipped with a warning. Raises `SceneGraphError` naming `source`, place and reason.
    """
    notices = Notices(source)
    if isinstance(document, list) and not document:
        raise SceneGraphError(f"{source}: the list of graphs is empty")
    parts, reader = _parts(document)
    found = [_read(graph, source, path, notices, reader) for path, graph in parts]
    notices.close()
    graphs = [graph for graph in found if graph is not None]
    if not graphs:
        raise SceneGraphError(f"{source}: no graph in it has an object")
    return graphs
