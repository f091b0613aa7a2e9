"""Turns LAION-SG's annotation files into {train,val,test}.jsonl, without boxes; names and predicates do not change.

A record is {"img_id", "name" (the image's file), "items": [{"item_id", "label", "attributes"}], "relations": [{"item1",
"relation", "item2"}], ...}. Attributes go in front of the label, as everywhere in this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sgg_fast.data import jsonl
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.images import stays_inside
from sgg_fast.data.prepare.place import preparing
from sgg_fast.data.prepare.records import FaultError, PrepareError, checked_text, stream
from sgg_fast.data.prepare.report import Report
from sgg_fast.graph import SceneGraphError, shown

_PLACE = re.compile(r"((?:items|relations)\[\d+\][^:]*): (.*)", re.DOTALL)
"""Place of a fault within a graph: items[3].label."""
SOURCE = "LAION-SG's annotation files: https://huggingface.co/datasets/mengcy/LAION-SG"


def prepare(
    files: Mapping[str, Path],
    out: Path,
    images: Path | None = None,
    resize: str = "crop",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Read the annotation file of each split and write the set to `out`. Raises `PrepareError`.

    A record with a fault is skipped completely, because a graph without one of its objects has another meaning. The
    published files contain relations of an item to itself and exact repeats: only these relations are skipped, and they
    are counted.
    """
    for path in files.values():
        if not path.is_file():
            raise PrepareError(f"{path}: there is no such file; {SOURCE}")
    report = Report({"files": {split: str(path) for split, path in files.items()}}, dict.fromkeys(files))
    seen: set[str] = set()
    with preparing(out, jsonl.files_of(files), overwrite, report, images):
        splits = {split: _records(path, split, report, seen, say) for split, path in files.items()}
        jsonl.write_set(out, {"kind": "laion-sg", "resize": resize}, splits, report.text, images)
    return report


def _records(
    path: Path, split: str, report: Report, seen: set[str], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Lines of the set; `report` gets the faults. `seen`: images of every split so far."""
    say(f"reading {path}")
    for number, record in enumerate(stream(path)):
        report.listed[split] += 1
        name = record.get("name") if isinstance(record, dict) else None
        where = f"record {number}" + (f" ({shown(name)})" if name else "")
        try:
            line = _line(record, report)
            if line["image"] in seen:
                raise FaultError("image occurs again")
            seen.add(line["image"])
        except FaultError as fault:
            within = _PLACE.match(str(fault))
            at, reason = within.groups() if within else ("", str(fault))
            report.fault(path.name, f"{where}, {at}" if at else where, reason)
            report.drop_image(split, name if isinstance(name, str) else number, "faulty record")
            continue
        report.kept[split] += 1
        yield line
    if split == "train" and not report.kept[split]:
        raise PrepareError(
            f"{path}: none of {report.listed[split]} records can be used; is it one of {SOURCE}? {report.why()}"
        )


def _line(record: Any, report: Report) -> dict[str, Any]:
    """The set's line of a record. Raises `FaultError`."""
    if not isinstance(record, dict):
        raise FaultError("record that is not an object")
    image = checked_text(record.get("name"), "image name")
    if not stays_inside(image):
        raise FaultError("image path that is absolute or leaves its folder")
    for key in ("items", "relations"):
        if not isinstance(record.get(key), list):
            raise FaultError(f"record without a list of {key}")
        report.read_parts["objects" if key == "items" else key] += len(record[key])
    ids = [shown(item.get("item_id")) for item in record["items"] if isinstance(item, dict)]
    if not ids:
        raise FaultError("graph without objects")
    if len(set(ids)) < len(ids):
        raise FaultError("item id occurs again")
    graph = {"items": record["items"], "relations": _distinct(record["relations"], report)}
    try:
        (scene,) = parse_scene_graphs(graph, "graph")
    except SceneGraphError as error:
        raise FaultError(str(error).removeprefix("graph: ")) from error
    line = {"id": shown(record.get("img_id")).strip("'"), "image": image, "objects": scene.objects,
            "relationships": scene.relations}  # fmt: skip
    if fault := jsonl.fault_of(line):
        raise FaultError(fault)
    return line


def _distinct(relations: list[Any], report: Report) -> list[Any]:
    """Relations without self-relations of an item and exact repeats."""
    kept, seen = [], set()
    for relation in relations:
        triple = tuple(shown(relation.get(key)) for key in ("item1", "relation", "item2")) if isinstance(
            relation, dict) else None  # fmt: skip
        if triple and triple[0] == triple[2]:
            report.drop("relations", "of an item to itself")
        elif triple and triple in seen:
            report.drop("relations", "exact repeat")
        else:
            kept.append(relation)
            seen.add(triple)
    return kept
