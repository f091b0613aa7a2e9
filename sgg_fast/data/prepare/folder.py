"""A folder of one's own pictures, each with its graph in a .json beside it, checked and made a set.

Training reads such a folder as it is; this names every file that cannot be used, goes into subfolders and sets images
aside for validation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgg_fast.config import ConfigError
from sgg_fast.data import jsonl
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.images import IMAGE_ENDINGS, ImageError, open_rgb
from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.report import Report
from sgg_fast.graph import SceneGraphError


def prepare(
    root: Path,
    out: Path,
    val_share: float = 0.0,
    resize: str = "crop",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check every picture and graph below `root`, write the set to `out` and link its images. Raises `PrepareError`.

    Whether an image is train or val follows from a hash of its path, so adding images moves none of the others.
    """
    if not root.is_dir():
        raise PrepareError(f"{root}: there is no such folder")
    if not 0 <= val_share < 1:
        raise PrepareError(f"--val-share must lie between 0 and 1, not {val_share}")
    if jsonl.is_set(out) and not overwrite:
        raise PrepareError(f"{out} already holds a set; --overwrite replaces it")
    report = Report({"root": str(root), "val_share": val_share, "resize": resize}, {"train": None, "val": None})
    paths: dict[str, list[Path]] = {"train": [], "val": []}
    for path in sorted(root.rglob("*"), key=os.fsencode):
        if path.suffix.lower() in IMAGE_ENDINGS and out not in path.parents:
            relative = path.relative_to(root)
            drawn = int.from_bytes(hashlib.blake2b(os.fsencode(relative), digest_size=4).digest(), "little") / 2**32
            paths["val" if drawn < val_share else "train"].append(relative)
        elif path.suffix.lower() == ".json" and out not in path.parents:
            _check_alone(path, root, report)
    splits = {split: _records(root, found, split, report) for split, found in paths.items()}
    say(f"checking {sum(map(len, paths.values()))} images of {root}")
    try:
        jsonl.write_set(out, {"kind": "folder", "resize": resize}, splits, report.text, root)
    except PrepareError:
        raise
    except ConfigError as error:
        raise PrepareError(str(error)) from error
    return report


def _check_alone(path: Path, root: Path, report: Report) -> None:
    """Name a graph that has no picture."""
    if not any(path.with_suffix(ending).is_file() for ending in IMAGE_ENDINGS):
        report.fault("graphs", _named(path.relative_to(root)), "no picture of the same name")


def _records(root: Path, paths: list[Path], split: str, report: Report) -> Iterator[dict[str, Any]]:
    for relative in paths:
        report.listed[split] += 1
        name, reason = _named(relative), ""
        graph = None
        try:
            os.fspath(relative).encode("utf-8")
            graphs = load_scene_graphs((root / relative).with_suffix(".json"))
            if len(graphs) == 1:
                graph = graphs[0]
                open_rgb(root / relative)
            else:
                reason = f"{len(graphs)} graphs where there must be one"
        except UnicodeEncodeError:
            reason = "file name that is not UTF-8"
        except ImageError as error:
            reason = error.reason
        except SceneGraphError as error:
            reason = str(error).removeprefix(f"{(root / relative).with_suffix('.json')}: ")
        if reason or graph is None:
            report.fault("images", name, reason)
            report.drop_image(split, name, "picture or graph that cannot be used")
            continue
        report.kept[split] += 1
        yield {"id": name, "image": relative.as_posix(), "objects": graph.objects, "relationships": graph.relations}
    if split == "train" and not report.kept[split]:
        named = "; ".join(f"{where[0]}: {reason}" for (_, reason), where in list(report.faults.items())[:3])
        raise PrepareError(f"{root}: no image with a usable graph beside it (scene.png and scene.json); {named}")


def _named(path: Path) -> str:
    """A path as text that can be printed."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
