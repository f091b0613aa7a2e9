"""Warnings before drawing: unknown words, names that are cut, relations that contradict each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from sgg_fast.data.text_form import object_labels
from sgg_fast.graph import SceneGraph, shown
from sgg_fast.nn.text_baseline import phrases
from sgg_fast.pipeline import SceneGraphToImagePipeline

_MOST = 20
"""Words, or lines of one kind, that are listed; a number stands for the rest."""

_AXES: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("above", "over"), ("vertical", 1)),
    **dict.fromkeys(("below", "under", "beneath", "underneath"), ("vertical", -1)),
    **dict.fromkeys(("left of", "to left of", "on left of", "to the left of"), ("horizontal", 1)),
    **dict.fromkeys(("right of", "to right of", "on right of", "to the right of"), ("horizontal", -1)),
    **dict.fromkeys(("in front of",), ("depth", 1)),
    **dict.fromkeys(("behind",), ("depth", -1)),
    **dict.fromkeys(("inside", "inside of", "within"), ("containment", 1)),
    **dict.fromkeys(("surrounding",), ("containment", -1)),
}
"""Predicate -> axis and direction; the reverse of a relation has the other direction."""


def contradictions(graph: SceneGraph) -> list[str]:
    """Pairs of relations that no picture can show at once: above and below, or each left of the other."""
    first: dict[tuple[int, int, str], tuple[int, str]] = {}
    labels, found = object_labels(graph), []
    for subject, predicate, obj in graph.relations:
        if predicate.lower() not in _AXES:
            continue
        axis, way = _AXES[predicate.lower()]
        text = f"{labels[subject]} {predicate} {labels[obj]}"
        if subject > obj:
            subject, obj, way = obj, subject, -way
        before = first.setdefault((subject, obj, axis), (way, text))
        if before[0] != way:
            found.append(f"{before[1]}, and {text}")
    return found


def cut_names(pipeline: SceneGraphToImagePipeline, graph: SceneGraph) -> list[str]:
    """Names, and phrases that the context starts from, that are longer than the text tower's input."""
    tokenizers = [(pipeline.graph_tokenizer, dict.fromkeys(graph.names))]
    encoder = pipeline.graph_encoder.config
    if pipeline.tokenizer is not None and (encoder.get("token_init") == "text" or "form" in encoder):
        tokenizers.append((pipeline.tokenizer, dict.fromkeys(phrases(graph))))
    found: dict[str, None] = {}
    for tokenizer, texts in tokenizers:
        for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
            if len(ids) > tokenizer.model_max_length:
                found[f"{shown(text)} (read up to token {tokenizer.model_max_length})"] = None
            elif tokenizer.eos_token_id in ids[:-1]:
                found[f"{shown(text)} (read up to its {tokenizer.eos_token})"] = None
    return list(found)


def unseen_words(pipeline: SceneGraphToImagePipeline, graphs: Sequence[SceneGraph], most: int = _MOST) -> list[str]:
    """Words that were not in training, each with the nearest known word; `most` of them, sorted."""
    known = sorted(pipeline.graph_encoder.config.trained_names)
    unseen = pipeline.unseen_names(graphs)[:most]
    near = [(word, difflib.get_close_matches(word, known, n=1, cutoff=0.75)) for word in unseen]
    return [f"{word} (did you mean {found[0]}?)" if found else word for word, found in near]


def graph_notices(pipeline: SceneGraphToImagePipeline, graph: SceneGraph) -> list[str]:
    """All notices of one graph."""
    unseen = [f"never seen in training: {word}" for word in unseen_words(pipeline, [graph])]
    cut = [f"cut: {name}" for name in cut_names(pipeline, graph)]
    return [*unseen, *cut, *(f"contradiction: {pair}" for pair in contradictions(graph))]


def notice_lines(pipeline: SceneGraphToImagePipeline, graphs: dict[str, SceneGraph]) -> list[str]:
    """One line for each kind of notice; with several graphs, each item names its graphs (by the keys of `graphs`)."""
    unseen: dict[str, list[str]] = {}
    for stem, graph in graphs.items():
        for word in pipeline.unseen_names([graph]):
            unseen.setdefault(word, []).append(stem)
    listed = dict(zip(sorted(unseen), unseen_words(pipeline, list(graphs.values())), strict=False))
    several = len(graphs) > 1
    words = [f"{listed[word]} in {_some(unseen[word])}" if several else listed[word] for word in listed]
    more = f", and {len(unseen) - len(listed)} more" if len(unseen) > len(listed) else ""
    lines = [f"words that the model never saw in training: {', '.join(words)}{more}"] if words else []
    for title, find in (
        ("names that are cut", lambda graph: cut_names(pipeline, graph)),
        ("relations that contradict each other", contradictions),
    ):
        found = [f"{stem}: {text}" if several else text for stem, graph in graphs.items() for text in find(graph)]
        if found:
            more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
            lines.append(f"{title}: {'; '.join(found[:_MOST])}{more}")
    return lines


def untaught_notice(pipeline: SceneGraphToImagePipeline, relation_guidance: float) -> str:
    """One line if relation guidance is on but the last training is known to lack relation dropout; else ""."""
    settings = (pipeline.config.get("provenance") or {}).get("settings") or {}
    if not relation_guidance or settings.get("relation_dropout") != 0:
        return ""
    return "relation guidance is a guess: this model was last trained without --relation-dropout"


def _some(stems: Iterable[str], most: int = 3) -> str:
    stems = list(stems)
    return ", ".join(stems[:most]) + (f" and {len(stems) - most} more" if len(stems) > most else "")
