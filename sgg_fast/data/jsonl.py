"""Reads and writes a prepared set of any origin: set.json and, for each split, one JSON line an image.

{"id": 7, "image": "train2017/7.jpg", "objects": ["sky", "sheep"], "relationships": [[0, "above", 1]],
 "boxes": [[0, 0, 640, 200], [10, 220, 90, 60]]}

`boxes` (x, y, w, h in pixels) may be absent. Sets with relations derived from boxes (COCO) have "centres" (x, y of each
object's mask in shares of the picture) and "size" (width, height in pixels) in place of "relationships".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgg_fast import digests
from sgg_fast.config import ConfigError
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.images import RESIZE, stays_inside
from sgg_fast.data.spatial import spatial_relations
from sgg_fast.files import write_together
from sgg_fast.graph import SceneGraph, SceneGraphError, shown

FORMAT = "sgg_fast set 1"
MARK = "set.json"
"""Written last: a folder with this file is complete."""
AGAIN = "prepare the set again (--overwrite)"
ON_PURPOSE = f'{AGAIN}, or, if you changed it on purpose, delete "files" and "sha256" from {MARK}'
_GRAPH_KEYS = {"objects", "relationships"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One image of a split."""

    image: str
    """Path relative to the folder of images."""
    graphs: tuple[SceneGraph, ...]
    """One graph for each draw of relations."""
    boxes: np.ndarray | None
    """float64 [N, 4] x, y, w, h in pixels."""


def files_of(splits: Iterable[str]) -> list[str]:
    """Names of the files of a set, in the order of writing."""
    return [*(f"{split}.jsonl" for split in splits), "report.json", MARK]


def is_set(folder: Path) -> bool:
    """True if `folder` holds a prepared set of this kind."""
    return (folder / MARK).is_file()


def write_set(
    out: Path,
    header: Mapping[str, Any],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    report: Callable[[], str],
    images: Path | None = None,
) -> None:
    """Write SPLIT.jsonl of each split, report.json and set.json; the same records give the same bytes.

    Files are written aside and renamed, set.json last. `report` is called after the last record. OUT/images becomes a
    link to `images`.
    """
    with write_together(out, files_of(splits), lambda: link_images(out, images)) as aside:
        counts = {}
        for split, records in splits.items():
            counts[split] = 0
            with (aside / f"{split}.jsonl").open("w", encoding="ascii") as file:
                for record in records:
                    file.write(json.dumps(record, separators=(",", ":")) + "\n")
                    counts[split] += 1
        (aside / "report.json").write_text(report(), encoding="ascii")
        files = {f"{split}.jsonl": digests.sha256_of(aside / f"{split}.jsonl") for split in counts}
        mark = {"format": FORMAT, **header, "images": counts, "files": files}
        text = json.dumps({**mark, "sha256": _digest(mark)}, indent=1) + "\n"
        (aside / MARK).write_text(text, encoding="ascii")


def fault_of(record: Mapping[str, Any]) -> str:
    """Reason why `read_lines` would refuse a record, or "". Writers call it before writing."""
    try:
        _line(json.loads(json.dumps(record)), 1, "record")
    except (SceneGraphError, ConfigError) as error:
        return str(error).removeprefix("record: ")
    return ""


def check_link(out: Path, images: Path | None) -> None:
    """Raises `ConfigError` if `link_images` would fail."""
    if images is None:
        return
    if not images.is_dir():
        raise ConfigError(f"--images {images}: there is no such folder")
    link = out / "images"
    if images.resolve() != link.resolve() and link.exists() and not link.is_symlink():
        raise ConfigError(f"{link} is there already; move it away or leave --images out")


def link_images(out: Path, images: Path | None) -> None:
    """Make the link OUT/images -> `images` unless it exists."""
    link = out / "images"
    if images is not None and images.resolve() != link.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(images.resolve(), target_is_directory=True)


def read_header(folder: Path, split: str = "train") -> dict[str, Any]:
    """The content of set.json. Raises `ConfigError` if it or the split's file was changed."""
    path = folder / MARK
    try:
        header = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {AGAIN}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("resize") not in RESIZE:
        raise ConfigError(f"{path}: not the header of a prepared set ({FORMAT}); {AGAIN}")
    if header.pop("sha256", None) not in (None, _digest(header)):
        raise ConfigError(f"{path}: its bytes are not those that were written (SHA-256 differs); {ON_PURPOSE}")
    file, known = folder / f"{split}.jsonl", header.get("files", {})
    known = {file.name: known[file.name]} if isinstance(known, dict) and file.name in known else {}
    if file.is_file() and digests.changed(folder, known):
        raise ConfigError(f"{file}: its bytes are not those that were written (SHA-256 differs); {ON_PURPOSE}")
    return header


def _digest(header: Mapping[str, Any]) -> str:
    """Digest of the header without its digest field."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def read_lines(path: Path, draws: int = 1) -> Iterator[Line]:
    """Images of a split, in order. Raises `ConfigError` that names file, line and reason."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _line(json.loads(text), draws, f"{path}: line {number}")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; {AGAIN}") from error
    except (SceneGraphError, ConfigError) as error:
        raise ConfigError(f"{error}; {AGAIN}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        raise ConfigError(f"{path}: not usable JSON near line {number}: {error}; {AGAIN}") from error


def _line(record: Any, draws: int, where: str) -> Line:
    image = record.get("image") if isinstance(record, dict) else None
    if not isinstance(image, str) or not stays_inside(image):
        raise ConfigError(f"{where}: image path {shown(image)} is absent or leaves the folder of the images")
    boxes = _numbers(record.get("boxes"), 4, where) if "boxes" in record else None
    if "centres" in record:
        graphs = _derived(record, boxes, draws, where)
    else:
        graphs = parse_scene_graphs({key: record[key] for key in record.keys() & _GRAPH_KEYS}, where) * draws
    if boxes is not None and len(boxes) != len(graphs[0].objects):
        raise ConfigError(f"{where}: {len(boxes)} boxes for {len(graphs[0].objects)} objects")
    return Line(image, tuple(graphs), boxes)


def _derived(record: dict[str, Any], boxes: np.ndarray | None, draws: int, where: str) -> list[SceneGraph]:
    """Graphs with relations derived from boxes and centres."""
    centres, size = _numbers(record["centres"], 2, where), _numbers([record.get("size")], 2, where)
    names, image_id = record.get("objects"), record.get("id")
    fits = isinstance(names, list) and boxes is not None and len(boxes) == len(centres) == len(names)
    if not fits or len(size) != 1 or not (size > 0).all():
        raise ConfigError(f"{where}: boxes, centres and size do not fit the objects")
    assert boxes is not None
    if not isinstance(image_id, int):
        raise ConfigError(f"{where}: no id, which relations are drawn from")
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / np.tile(size[0], 2)
    places = corners.tolist(), centres.tolist()
    drawn = [
        {"objects": names, "relationships": list(map(list, spatial_relations(image_id, *places, seed)))}
        for seed in range(draws)
    ]
    return parse_scene_graphs(drawn, where)


def _numbers(value: Any, width: int, where: str) -> np.ndarray:
    """`value` as float64 [N, width]."""
    rows = value if isinstance(value, list) else [None]
    for row in rows:
        if not isinstance(row, list) or len(row) != width or not all(type(x) in (int, float) for x in row):
            raise ConfigError(f"{where}: lists of {width} numbers expected")
    try:
        array = np.array(rows, dtype=np.float64).reshape(-1, width)
    except OverflowError as error:
        raise ConfigError(f"{where}: a number is too large") from error
    if not np.isfinite(array).all():
        raise ConfigError(f"{where}: a number is not finite")
    return array
