"""Edits of a scene graph as text: `sheep -> cow`, `add hat on sheep`, `remove hat`.

    sheep -> cow                              renames an object
    sheep on grass -> sheep left of house     replaces a relation
    add boat, add hat on sheep                adds an object or a relation; a relation's new objects are added too
    remove hat, remove hat on sheep           removes an object with its relations, or one relation

Objects and relations are written as in the one-line form; `sheep#2` is the second of several. Everything else is
unchanged and stays in order.
"""

from __future__ import annotations

from collections.abc import Sequence

from sgg_fast.data.text_form import Clause, Mention, object_labels, parse_clause, to_text
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

_HELP = 'write "sheep -> cow", "add hat on sheep" or "remove hat"'


def edited(graph: SceneGraph, edits: Sequence[str]) -> SceneGraph:
    """The graph after all edits, in order. Raises `SceneGraphError` as `apply_edit` does."""
    for edit in edits:
        graph = apply_edit(graph, edit)
    return graph


def apply_edit(graph: SceneGraph, text: str) -> SceneGraph:
    """The changed graph. Raises `SceneGraphError` for text that is no edit or names what the graph does not have."""
    where = f"--edit {shown(' '.join(text.split()))}"
    if "->" in text:
        old, _, new = text.partition("->")
        changed = _replace(graph, _clause(old, where), _clause(new, where), where)
    else:
        command, _, rest = text.strip().partition(" ")
        if command not in ("add", "remove"):
            raise SceneGraphError(f"{where}: {_HELP}")
        changed = (_add if command == "add" else _remove)(graph, _clause(rest, where), where)
    if changed == graph:
        raise SceneGraphError(f"{where}: changes nothing; the graph is {_brief(to_text(graph))}")
    return changed


def _clause(text: str, where: str) -> Clause:
    if not text.strip():
        raise SceneGraphError(f"{where}: {_HELP}")
    return parse_clause(text, where)


def _find(objects: Sequence[str], mention: Mention, where: str) -> int:
    """Index of the mentioned object; one of several of that name needs a number."""
    name, number, numbered = mention
    places = [i for i, other in enumerate(objects) if other == name]
    if number > len(places):
        there = _brief(", ".join(object_labels(SceneGraph(tuple(objects)))))
        raise SceneGraphError(f"{where}: the graph has no {name}{f'#{number}' if places else ''}; it has {there}")
    if len(places) > 1 and not numbered:
        raise SceneGraphError(f"{where}: the graph has {len(places)} of that name: write {name}#1, {name}#2, ...")
    return places[number - 1]


def _relation(graph: SceneGraph, clause: Clause, where: str) -> int:
    """Index of the mentioned relation."""
    ends = [_find(graph.objects, mention, where) for mention in (clause.subject, clause.object) if mention]
    wanted = (ends[0], clause.predicate, ends[1])
    if wanted not in graph.relations:
        raise SceneGraphError(f"{where}: the graph has no such relation; it is {_brief(to_text(graph))}")
    return graph.relations.index(wanted)


def _related(graph: SceneGraph, clause: Clause, where: str) -> tuple[tuple[str, ...], tuple[int, str, int]]:
    """(objects, relation): the graph's objects, plus the new relation's own if the graph lacks them."""
    objects, ends = list(graph.objects), []
    for mention in (clause.subject, clause.object):
        assert mention is not None
        if mention.number == objects.count(mention.name) + 1:
            objects.append(mention.name)
            ends.append(len(objects) - 1)
        else:
            ends.append(_find(objects, mention, where))
    return tuple(objects), (ends[0], clause.predicate, ends[1])


def _replace(graph: SceneGraph, old: Clause, new: Clause, where: str) -> SceneGraph:
    if bool(old.object) != bool(new.object):
        raise SceneGraphError(f"{where}: an object becomes an object, a relation becomes a relation")
    if not old.object:
        objects = list(graph.objects)
        objects[_find(objects, old.subject, where)] = new.subject.name
        return SceneGraph(tuple(objects), graph.relations)
    place = _relation(graph, old, where)
    named, relation = _related(graph, new, where)
    return SceneGraph(named, _distinct([*graph.relations[:place], relation, *graph.relations[place + 1 :]]))


def _add(graph: SceneGraph, clause: Clause, where: str) -> SceneGraph:
    if not clause.object:
        return SceneGraph((*graph.objects, clause.subject.name), graph.relations)
    objects, relation = _related(graph, clause, where)
    return SceneGraph(objects, _distinct([*graph.relations, relation]))


def _remove(graph: SceneGraph, clause: Clause, where: str) -> SceneGraph:
    if clause.object:
        place = _relation(graph, clause, where)
        return SceneGraph(graph.objects, graph.relations[:place] + graph.relations[place + 1 :])
    gone = _find(graph.objects, clause.subject, where)
    if len(graph.objects) == 1:
        raise SceneGraphError(f"{where}: it is the only object")
    left = [(s - (s > gone), p, o - (o > gone)) for s, p, o in graph.relations if gone not in (s, o)]
    return SceneGraph(graph.objects[:gone] + graph.objects[gone + 1 :], tuple(left))


def _distinct(relations: Sequence[tuple[int, str, int]]) -> tuple[tuple[int, str, int], ...]:
    return tuple(dict.fromkeys(relations))


def _brief(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
