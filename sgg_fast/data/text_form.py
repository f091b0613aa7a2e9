"""The one-line form of a scene graph: "sheep standing on grass; sky above grass; sheep#2 left of sheep; boat".

";" separates clauses. A clause is a relation (subject, predicate, object) or one object alone. Equal names are the same
object; `sheep#2` is a second sheep, and `sheep` means `sheep#1`. Articles are dropped. Names are free text, so the
parser finds the predicate by a list of common ones ("on", "in front of", "wearing", any "-ing" verb with a
preposition); other predicates need parentheses: "man (hops over) fence".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sgg_fast.data.layouts import MAX_SIZE, clean_name
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

_ARTICLES = {"a", "an", "the"}
_PLACES = (
    "above", "across", "against", "along", "around", "at", "behind", "below", "beneath", "beside", "by", "close to",
    "down", "far from", "from", "in", "in front of", "inside", "inside of", "into", "left of", "near", "next to", "off",
    "on", "on left of", "on right of", "on side of", "on top of", "onto", "out of", "outside", "over", "right of",
    "through", "to", "to left of", "to right of", "toward", "towards", "under", "underneath", "up", "upon", "with",
    "within",
)  # fmt: skip
_VERBS = (
    "attached to", "belonging to", "carries", "covered by", "covered in", "covered with", "eats", "filled with", "has",
    "have", "holds", "leans on", "made of", "mounted on", "painted on", "parked on", "reflected in", "rides", "sits on",
    "stands on", "surrounded by", "surrounding", "wears",
)  # fmt: skip
PREDICATES = frozenset((*_PLACES, *_VERBS))
"""Predicates without parentheses, besides every "-ing" verb, alone or before one of the places."""
_SHORT = {f"{lead} {side} of": f"{side} of" for lead in ("to", "on") for side in ("left", "right")}
_LAST_RESORT = frozenset(("of", "and", "for"))
_NOUNS = frozenset(
    ("awning", "being", "building", "ceiling", "clothing", "crossing", "duckling", "earring", "evening", "icing",
     "king", "landing", "lightning", "morning", "opening", "painting", "railing", "ring", "siding", "spring", "string",
     "swing", "thing", "wedding", "wing", "writing")
)  # fmt: skip
"""Words in -ing that are not verbs."""
_LONGEST = 4
_NUMBERED = re.compile(r"(.*?)\s*#\s*([0-9]{1,4})")


class Mention(NamedTuple):
    """An object as written."""

    name: str
    number: int
    numbered: bool
    """True if the number was written; the default number is 1."""


class Clause(NamedTuple):
    """A parsed clause: one object alone, or a relation."""

    subject: Mention
    predicate: str = ""
    object: Mention | None = None


def parse_text(text: str, source: str = "graph") -> SceneGraph:
    """The graph of the clauses of `text`. Raises `SceneGraphError`, beginning with `source`."""
    index: dict[tuple[str, int], int] = {}
    relations: dict[tuple[int, str, int], None] = {}
    for part in text.split(";"):
        if part.strip():
            clause = parse_clause(part, source)
            ends = [index.setdefault(end[:2], len(index)) for end in (clause.subject, clause.object) if end]
            if clause.object:
                relations[ends[0], clause.predicate, ends[1]] = None
            if len(index) + len(relations) > MAX_SIZE:
                raise SceneGraphError(f"{source}: more than {MAX_SIZE} objects and relations in one graph")
    if not index:
        raise SceneGraphError(f'{source}: no object in {shown(text)}; write "sheep standing on grass; sky above grass"')
    return SceneGraph(tuple(name for name, _ in index), tuple(relations))


def parse_clause(text: str, source: str) -> Clause:
    """Parse one clause. Raises `SceneGraphError` if it is ambiguous or empty."""
    where = f"{source}: {shown(' '.join(text.split()))}"
    if text.count("(") or text.count(")"):
        parts = re.fullmatch(r"([^()]*)\(([^()]*)\)([^()]*)", text, re.DOTALL)
        if parts is None:
            raise SceneGraphError(f"{where}: one predicate in parentheses, as in sheep (standing on) grass")
        subject, predicate, obj = parts.groups()
    else:
        words = [word for word in text.split() if word.lower() not in _ARTICLES]
        spans = list(_predicates(words)) or list(_predicates(words, _LAST_RESORT))
        if not spans:
            return Clause(_mention(" ".join(words), where))
        start, end = spans[0]
        if start == 0 or end == len(words):
            raise SceneGraphError(f"{where}: an object is missing beside {' '.join(words[start:end])!r}")
        if len(spans) > 1:
            raise SceneGraphError(
                f"{where}: more than one relation; part them by ';' or put the predicate in parentheses, "
                "as in sheep (standing on) grass"
            )
        subject, predicate, obj = (" ".join(part) for part in (words[:start], words[start:end], words[end:]))
        predicate = _SHORT.get(predicate.lower(), predicate)
    ends = _mention(subject, where), _mention(obj, where)
    if ends[0][:2] == ends[1][:2]:
        name = shown(ends[0].name)[1:-1]
        raise SceneGraphError(f"{where}: related to itself; several of one name are written {name}#1, {name}#2")
    return Clause(ends[0], clean_name(predicate, where), ends[1])


def _predicates(words: Sequence[str], known: frozenset[str] = PREDICATES) -> list[tuple[int, int]]:
    """(start, end) of every predicate among the words, from the left, each as long as possible."""
    found, start = [], 0
    while start < len(words):
        for end in range(min(start + _LONGEST, len(words)), start, -1):
            if _is_predicate([word.lower() for word in words[start:end]], start, known):
                found.append((start, end))
                start = end - 1
                break
        start += 1
    return found


def is_predicate(name: str) -> bool:
    """True if a name reads as a predicate: a common one, or a verb in -ing with or without a place."""
    return _is_predicate(name.lower().split(), 1, PREDICATES)


def _is_predicate(words: list[str], start: int, known: frozenset[str]) -> bool:
    if " ".join(words) in known:
        return True
    # At the start of a clause a word in -ing describes the subject: "running dog".
    verb = start > 0 and words[0].endswith("ing") and len(words[0]) > 4 and words[0] not in _NOUNS
    return verb and (len(words) == 1 or " ".join(words[1:]) in _PLACES)


def _mention(text: str, where: str) -> Mention:
    text = " ".join(word for word in text.split() if word.lower() not in _ARTICLES)
    match = _NUMBERED.fullmatch(text)
    name, number = match.groups() if match else (text, "1")
    name = clean_name(name, where)
    if "#" in name or int(number) < 1:
        raise SceneGraphError(f"{where}: several of one name are written sheep#1, sheep#2")
    return Mention(name, int(number), match is not None)


def object_labels(graph: SceneGraph) -> list[str]:
    """Each object's name in the one-line form; repeated names are numbered."""
    total, seen = Counter(graph.objects), Counter[str]()
    labels = []
    for name in graph.objects:
        seen[name] += 1
        labels.append(f"{name}#{seen[name]}" if total[name] > 1 else name)
    return labels


def to_text(graph: SceneGraph) -> str:
    """The graph in one line with every predicate in parentheses; `parse_text` reads it back."""
    labels = object_labels(graph)
    related = {end for s, _, o in graph.relations for end in (s, o)}
    clauses = [f"{labels[s]} ({predicate}) {labels[o]}" for s, predicate, o in graph.relations]
    return "; ".join([*clauses, *(label for i, label in enumerate(labels) if i not in related)])
