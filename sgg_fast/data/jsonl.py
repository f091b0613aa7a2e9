"""A prepared set of any origin: set.json and, for each split, one JSON line an image.

{"id": 7, "image": "train2017/7.jpg", "objects": ["sky", "sheep"], "relationships": [[0, "above", 1]],
 "boxes": [[0, 0, 640, 200], [10, 220, 90, 60]]}

`boxes` (x, y, w, h in pixels) may be absent. Sets whose relations are derived from boxes (COCO) carry "centres" (x, y
of each object's mask in shares of the picture) and "size" (width, height in pixels) in place of "relationships".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgg_fast.config import ConfigError
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.images import RESIZE, stays_inside
from sgg_fast.data.spatial import spatial_relations
from sgg_fast.files import write_together
from sgg_fast.graph import SceneGraph, SceneGraphError

FORMAT = "sgg_fast set 1"
MARK = "set.json"
"""Put in place last: a folder that has it is whole."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One image of a split."""

    image: str
    """Path below the folder of images."""
    graphs: tuple[SceneGraph, ...]
    """One for each draw of relations."""
    boxes: np.ndarray | None
    """float64 [N, 4] x, y, w, h in pixels."""


def is_set(folder: Path) -> bool:
    """Whether `folder` holds a prepared set of this kind."""
    return (folder / MARK).is_file()


def write_set(
    out: Path,
    header: Mapping[str, Any],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    report: Callable[[], str],
    images: Path | None = None,
) -> None:
    """SPLIT.jsonl of each split, report.json and set.json; the same records give the same bytes.

    Written aside and renamed, set.json last. `report` is asked when the last record has been taken. `images` becomes
    the link OUT/images.
    """
    with write_together(out, [*(f"{split}.jsonl" for split in splits), "report.json", MARK]) as aside:
        counts = {}
        for split, records in splits.items():
            counts[split] = 0
            with (aside / f"{split}.jsonl").open("w", encoding="ascii") as file:
                for record in records:
                    file.write(json.dumps(record, separators=(",", ":")) + "\n")
                    counts[split] += 1
        (aside / "report.json").write_text(report(), encoding="ascii")
        mark = {"format": FORMAT, **header, "images": counts}
        (aside / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="ascii")
    if images is not None and images.resolve() != (out / "images").resolve():
        link_images(out, images)


def link_images(out: Path, images: Path) -> None:
    """OUT/images -> `images`. Raises `ConfigError` where something else is there."""
    link = out / "images"
    if link.exists() and not link.is_symlink():
        raise ConfigError(f"{link} is there already; move it away or leave --images out")
    link.unlink(missing_ok=True)
    link.symlink_to(images.resolve(), target_is_directory=True)


def read_header(folder: Path) -> dict[str, Any]:
    """set.json. Raises `ConfigError`."""
    path = folder / MARK
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; prepare the set again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("resize") not in RESIZE:
        raise ConfigError(f"{path}: not the header of a prepared set ({FORMAT}); prepare the set again")
    return header


def read_lines(path: Path, draws: int = 1) -> Iterator[Line]:
    """Images of a split in order. Raises `ConfigError` that names file, line and reason."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                yield _line(json.loads(text), draws, f"{path}: line {number}")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; prepare the set again") from error
    except (SceneGraphError, ConfigError) as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        raise ConfigError(f"{path}: not usable JSON: {error}; prepare the set again") from error


def _line(record: Any, draws: int, where: str) -> Line:
    image = record.get("image") if isinstance(record, dict) else None
    if not isinstance(image, str) or not stays_inside(image):
        raise ConfigError(f"{where}: image path {image!r} is absent or leaves the folder of the images")
    boxes = _numbers(record.get("boxes"), 4, where) if "boxes" in record else None
    if "centres" not in record:
        return Line(image, tuple(parse_scene_graphs(record, where)) * draws, boxes)
    centres, size = _numbers(record["centres"], 2, where), _numbers([record.get("size")], 2, where)[0]
    if boxes is None or not len(boxes) == len(centres) == len(record.get("objects", ())) or not (size > 0).all():
        raise ConfigError(f"{where}: boxes, centres and size do not fit the objects")
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / np.tile(size, 2)
    image_id = record.get("id")
    if not isinstance(image_id, int):
        raise ConfigError(f"{where}: no id, which relations are drawn from")
    places = corners.tolist(), centres.tolist()
    drawn = [
        {"objects": record["objects"], "relationships": list(map(list, spatial_relations(image_id, *places, seed)))}
        for seed in range(draws)
    ]
    return Line(image, tuple(parse_scene_graphs(drawn, where)), boxes)


def _numbers(value: Any, width: int, where: str) -> np.ndarray:
    """float64 [N, width]."""
    try:
        array = np.array(value, dtype=np.float64).reshape(-1, width)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: lists of {width} numbers expected") from error
    if not np.isfinite(array).all():
        raise ConfigError(f"{where}: a number is not finite")
    return array
