"""What a scene graph looks like in each published layout: sg2im, Visual Genome, LAION-SG, GQA.

The layout is recognised by content, graph by graph. Not here: files and JSON (`sgg_fast/data/formats.py`), the one-line
form (`sgg_fast/data/text_form.py`).

    sg2im          {"objects": ["sheep", "grass"], "relationships": [[0, "on", 1]]}
    Visual Genome  {"image_id": 1, "objects": [{"object_id": 5, "names": ["sheep"], "attributes": ["white"]}],
                    "relationships": [{"subject": {"object_id": 5, "name": "sheep"}, "predicate": "ON", "object": {}}]}
                   objects.json, attributes.json (where the first key is "attributes"), relationships.json, and
                   scene_graphs.json, which has "subject_id" and "object_id"
    LAION-SG       {"img_id": "1", "items": [{"item_id": 0, "label": "sheep", "attributes": ["white"]}],
                    "relations": [{"item1": 0, "relation": "on", "item2": 1}]}
    GQA            {"7": {"objects": {"5": {"name": "sheep", "attributes": ["white"],
                                            "relations": [{"name": "on", "object": "6"}]}}}}

Attributes go in front of the name: "white sheep".
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from typing import Any

from sgg_fast.graph import SceneGraph, SceneGraphError, check_index, check_name, shown

logger = logging.getLogger(__name__)

MAX_SIZE = 4096
"""Objects and relations of one graph; each is a token that every pixel attends to."""
MAX_NAME = 200
"""Characters of a name or predicate; CLIP reads about 70 words."""


class Notices:
    """Warnings of what was left out of one document: the first few in full, the rest as a number."""

    def __init__(self, source: str, most: int = 5) -> None:
        self.source, self.most, self.num = source, most, 0

    def add(self, where: str, reason: str) -> None:
        self.num += 1
        if self.num <= self.most:
            logger.warning("%s: left out: %s", where, reason)

    def close(self) -> None:
        """Say how many went unsaid."""
        if self.num > self.most:
            logger.warning("%s: %d more left out for such reasons", self.source, self.num - self.most)


def clean_name(name: Any, where: str) -> str:
    """A name or predicate with its inner white space made single. Raises `SceneGraphError` that begins with `where`."""
    check_name(name, where)
    if len(name) > MAX_NAME:
        raise SceneGraphError(f"{where}: a name of {len(name)} characters; at most {MAX_NAME}")
    name = " ".join(name.split())
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise SceneGraphError(f"{where}: the name holds a control character, which is not text")
    return name


class _Draft:
    """A graph while it is being read; `where` is the place of the graph, ready to be put before a key."""

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
        """An object with an id; a second one of the same id, which published files have, is left out."""
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
        """(place, entry) of the list `holder[key]`; nothing where the key is absent."""
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


def _sg2im(graph: dict, draft: _Draft) -> None:
    names = graph.get("objects")
    if not isinstance(names, list) or not names:
        raise SceneGraphError(f"{draft.at('objects')}: must be a non-empty list of names")
    for place, name in draft.entries(graph, "objects", "names"):
        draft.add_object(name, place)
    form = "[subject, predicate, object]"
    for place, relation in draft.entries(graph, "relationships", form):
        if not isinstance(relation, list) or len(relation) != 3:
            raise SceneGraphError(f"{draft.at(place)}: must be {form}")
        subject, predicate, obj = relation
        for index in (subject, obj):
            check_index(index, len(names), draft.at(place))
        draft.relate(subject, predicate, obj, place)


def _visual_genome(graph: dict, draft: _Draft) -> None:
    def name_of(record: dict, place: str) -> Any:
        names = record.get("names")
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
        # A list in the published files, braces in their description.
        relations = list(relations.values()) if isinstance(relations, dict) else relations
        for at, relation in draft.records({"relations": relations}, "relations", f"{place}."):
            obj = draft.find(relation.get("object"), f"{at}.object")
            draft.relate(draft.index[key], relation.get("name"), obj, at)


_VG_LISTS = ("objects", "attributes", "relationships")


def _layout(graph: dict) -> Any:
    """The reader of a graph, by its content."""
    if "items" in graph and "objects" not in graph:
        return _laion_sg
    if isinstance(graph.get("objects"), dict):
        return _gqa
    lists = [graph[key] for key in _VG_LISTS if isinstance(graph.get(key), list)]
    first = next((entries[0] for entries in lists if entries), None)
    if isinstance(first, dict) or (lists and first is None and "image_id" in graph):
        return _visual_genome
    return _sg2im


def _read(graph: Any, source: str, path: str, notices: Notices) -> SceneGraph | None:
    """The graph at `path` of the document; None for a published record that has no object, which is left out."""
    if not isinstance(graph, dict):
        where = f"{source}: {path}" if path else source
        raise SceneGraphError(f'{where}: a graph must be an object with "objects" and "relationships"')
    draft = _Draft(f"{source}: {path}." if path else f"{source}: ", notices)
    _layout(graph)(graph, draft)
    if not draft.names:
        notices.add(f"{source}: {path}" if path else source, "a graph without objects")
        return None
    return draft.graph()


def _is_gqa_file(document: Any) -> bool:
    """Whether it is a dictionary from image id to GQA graph."""
    values = list(document.values()) if isinstance(document, dict) else []
    return bool(values) and all(isinstance(v, dict) and isinstance(v.get("objects"), dict) for v in values)


def read_document(document: Any, source: str) -> list[SceneGraph]:
    """Every graph of a parsed JSON document of any layout, which is not modified; one graph, or several.

    Raises `SceneGraphError` naming `source`, the place and the reason. Self-loops, exact duplicates, repeated ids,
    empty predicates and graphs without objects, which published files have, are left out with a warning.
    """
    notices = Notices(source)
    if isinstance(document, list):
        if not document:
            raise SceneGraphError(f"{source}: the list of graphs is empty")
        found = [_read(graph, source, f"[{i}]", notices) for i, graph in enumerate(document)]
    elif _is_gqa_file(document):
        found = [_read(graph, source, f"[{shown(key)}]", notices) for key, graph in document.items()]
    else:
        found = [_read(document, source, "", notices)]
    notices.close()
    graphs = [graph for graph in found if graph is not None]
    if not graphs:
        raise SceneGraphError(f"{source}: no graph in it has an object")
    return graphs
