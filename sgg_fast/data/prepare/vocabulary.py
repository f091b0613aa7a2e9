"""Vocabulary: alias files, names by count, comparison with a published vocabulary, check of the data's version."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sgg_fast.data.prepare.records import FaultError, PrepareError, checked_text
from sgg_fast.data.prepare.report import Report
from sgg_fast.data.vg_h5 import VOCABULARY

GET = (
    "version 1.4 (objects.json.zip and relationships.json.zip of 2017; sg2im's unnumbered links) from "
    "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html, or go on with --any-version"
)
WRONG = (259, 65)
"""Numbers of object and predicate names from version 1.2 with sg2im's settings; 260 and 66 with the two dummies."""
RIGHT = (178, 45)
"""Numbers of object and predicate names of the published vocabulary."""


def read_aliases(path: Path, clean: bool, report: Report) -> dict[str, str]:
    """Name -> the first name of its line. As in sg2im, a later line wins and an alias is replaced once."""
    aliases: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, start=1):
        names = [name.strip() for name in line.split(",")]
        try:
            names = [checked_text(name.lower() if clean else name, "alias") for name in names if name]
        except FaultError as fault:
            report.fault(path.name, f"line {number}", str(fault))
            continue
        aliases.update(dict.fromkeys(names, names[0]) if names else {})
    return aliases


def vocabulary_of(objects: list[str], attributes: list[str], predicates: list[str]) -> dict[str, Any]:
    """vocab.json's content, keys in sg2im's order."""
    document: dict[str, Any] = {}
    for kind, names in zip(VOCABULARY, (objects, attributes, predicates), strict=True):
        document[f"{kind}_name_to_idx"] = {name: i for i, name in enumerate(names)}
        document[f"{kind}_idx_to_name"] = names
    return document


def by_count(counter: Counter[str], least: int) -> list[str]:
    """Names with at least `least` occurrences, the most frequent first, ties by first occurrence."""
    return [name for name, count in counter.most_common() if count >= least]


def compare(ours: dict[str, Any], published: Any, path: Path) -> dict[str, Any]:
    """Differences of two vocabularies, by kind."""
    result = {}
    for kind in VOCABULARY:
        theirs = published.get(f"{kind}_idx_to_name") if isinstance(published, dict) else None
        if not isinstance(theirs, list) or not all(isinstance(name, str) for name in theirs):
            raise PrepareError(f"{path}: {kind}_idx_to_name must be a list of names, as sg2im writes it")
        own = ours[f"{kind}_idx_to_name"]
        missing = [name for name in theirs if name not in own]
        extra = [name for name in own if name not in theirs]
        same_order = [name for name in own if name in theirs] == [name for name in theirs if name in own]
        result[kind] = {"same": own == theirs, "missing": missing, "extra": extra, "reordered": not same_order}
    return result


def check_version(file: str, merged: bool, any_version: bool, report: Report) -> None:
    """Check for version 1.4, which merged objects that were annotated twice and lists them; earlier ones did not.

    Raises `PrepareError` for an earlier version, or warns with `any_version`.
    """
    if not merged:
        _wrong(f"{file} is not Visual Genome 1.4 but an earlier version (no object has merged_object_ids)",
               any_version, report)  # fmt: skip


def check_size(vocabulary: dict[str, Any], default_filters: bool, any_version: bool, report: Report) -> None:
    """Detect an earlier version by the number of names with sg2im's settings, without the two dummies."""
    sizes = tuple(len(vocabulary[f"{kind}_idx_to_name"]) - 1 for kind in ("object", "pred"))
    if not default_filters or sizes == RIGHT:
        return
    counts = f"{sizes[0]} object and {sizes[1]} predicate names where sg2im has {RIGHT[0]} and {RIGHT[1]}"
    if any(abs(ours - theirs) <= 1 for ours, theirs in zip(sizes, WRONG, strict=True)):
        _wrong(f"{counts}: the sign of Visual Genome 1.2 in place of 1.4", any_version, report)
    else:
        report.warnings.append(f"{counts}; are these the published files, whole?")


def _wrong(reason: str, any_version: bool, report: Report) -> None:
    if not any_version:
        raise PrepareError(f"{reason}; get {GET}")
    report.warnings.append(reason)
