"""The words that a model was trained on, for `infer.py --words` and the page."""

from __future__ import annotations

from collections.abc import Iterable

from sgg_fast.data.text_form import is_predicate
from sgg_fast.graph import SPOKEN


def vocabulary(trained_names: Iterable[str]) -> dict[str, list[str]]:
    """A model's one list of names as objects, predicates and attributes, each in alphabetical order.

    What the one-line form takes for a predicate is one. An attribute is what stands in front of another trained name
    ("red" of "red hat" if "hat" is there).
    """
    names = sorted(set(trained_names) - set(SPOKEN))
    predicates = [name for name in names if is_predicate(name)]
    objects = [name for name in names if name not in predicates]
    pairs = (name.partition(" ") for name in objects)
    return {"objects": objects, "predicates": predicates,
            "attributes": sorted({first for first, _, rest in pairs if rest in objects})}  # fmt: skip


def known_words(trained_names: Iterable[str]) -> str:
    """Two lines, objects and relations; attributes follow the object's name in brackets."""
    words = vocabulary(trained_names)
    attributes: dict[str, list[str]] = {}
    for name in words["objects"]:
        first, _, kind = name.partition(" ")
        if kind in words["objects"]:
            attributes.setdefault(kind, []).append(first)
        else:
            attributes.setdefault(name, [])
    things = [f"{kind} ({', '.join(before)})" if before else kind for kind, before in sorted(attributes.items())]
    return f"things: {', '.join(things)}\nrelations: {', '.join(words['predicates'])}"
