"""The words that a model was trained on: `infer.py --words`."""

from __future__ import annotations

from collections.abc import Iterable

from sgg_fast.data.text_form import is_predicate
from sgg_fast.graph import SPOKEN


def known_words(trained_names: Iterable[str]) -> str:
    """Two lines, objects and relations in alphabetical order; attributes follow the object's name in brackets.

    Relations are recognised as in graphs given in words.
    """
    names = {name for name in trained_names if name not in SPOKEN}
    relations = {name for name in names if is_predicate(name)}
    attributes: dict[str, list[str]] = {}
    for name in sorted(names - relations):
        attribute, _, kind = name.rpartition(" ")
        if attribute and kind in names:
            attributes.setdefault(kind, []).append(attribute)
        else:
            attributes.setdefault(name, [])
    things = [f"{kind} ({', '.join(said)})" if said else kind for kind, said in sorted(attributes.items())]
    return f"things: {', '.join(things)}\nrelations: {', '.join(sorted(relations))}"
