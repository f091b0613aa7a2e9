"""What a model was trained on, in words: `infer.py --words`."""

from __future__ import annotations

from collections.abc import Iterable

from sgg_fast.data.text_form import is_predicate
from sgg_fast.graph import SPOKEN


def known_words(trained_names: Iterable[str]) -> str:
    """Two lines, things and relations in alphabetical order; attributes stand in brackets behind the thing's name.

    Which names are relations is told as in graphs given in words.
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
