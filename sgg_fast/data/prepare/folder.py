"""Makes a set from a folder of pictures, each with its graph in a .json file beside it.

Training also reads such a folder directly. The preparation names every unusable file, reads subfolders and splits off
images for validation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgg_fast.data import jsonl
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.images import IMAGE_ENDINGS, TURNED, ImageError, graph_beside, open_rgb
from sgg_fast.data.prepare.place import preparing
from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.report import Report
from sgg_fast.graph import SceneGraphError

_NOTE = "pictures_turned_upright_by_their_orientation_tag"


def prepare(
    root: Path,
    out: Path,
    val_share: float = 0.0,
    resize: str = "crop",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check every picture and graph below `root`, write the set to `out` and link its images. Raises `PrepareError`.

    A hash of an image's path decides between train and val, so new images do not move others.
    """
    if not root.is_dir():
        raise PrepareError(f"{root}: there is no such folder")
    if out.resolve() == root.resolve():
        raise PrepareError(f"--out {out}: is --root itself; give another folder")
    if not 0 <= val_share < 1:
        raise PrepareError(f"--val-share must lie between 0 and 1, not {val_share}")
    report = Report({"root": str(root), "val_share": val_share, "resize": resize}, {"train": None, "val": None})
    with preparing(out, jsonl.files_of(report.paper), overwrite, report, root):
        paths: dict[str, list[Path]] = {"train": [], "val": []}
        own = os.path.relpath(out.resolve(), root.resolve())
        found = [path for path in sorted(root.rglob("*"), key=os.fsencode) if root / own not in path.parents]
        stems = {path.with_suffix("") for path in found if path.suffix.lower() in IMAGE_ENDINGS}
        for path in found:
            if path.suffix.lower() in IMAGE_ENDINGS:
                relative = path.relative_to(root)
                drawn = int.from_bytes(hashlib.blake2b(os.fsencode(relative), digest_size=4).digest(), "little") / 2**32
                paths["val" if drawn < val_share else "train"].append(relative)
            elif path.suffix.lower() == ".json" and path.with_suffix("") not in stems:
                report.fault("graphs", _named(path.relative_to(root)), "no picture of the same name")
        splits = {split: _records(root, listed, split, report) for split, listed in paths.items()}
        say(f"checking {sum(map(len, paths.values()))} images of {root}")
        jsonl.write_set(out, {"kind": "folder", "resize": resize}, splits, report.text, root)
    return report


def _records(root: Path, paths: list[Path], split: str, report: Report) -> Iterator[dict[str, Any]]:
    for relative in paths:
        report.listed[split] += 1
        name, reason, turned = _named(relative), "", False
        graph = file = None
        try:
            os.fspath(relative).encode("utf-8")
            file = graph_beside(root / relative)
            graphs = load_scene_graphs(file or (root / relative).with_suffix(".json"))
            if len(graphs) == 1:
                graph = graphs[0]
                turned = open_rgb(root / relative, upright=True).info[TURNED]
            else:
                reason = f"{len(graphs)} graphs where there must be one"
        except UnicodeEncodeError:
            reason = "file name that is not UTF-8"
        except ImageError as error:
            reason = error.reason
        except SceneGraphError as error:
            reason = str(error).removeprefix(f"{file or (root / relative).with_suffix('.json')}: ")
        if graph is not None and not reason:
            line = {"id": name, "image": relative.as_posix(), "objects": graph.objects,
                    "relationships": graph.relations}  # fmt: skip
            reason = jsonl.fault_of(line)
        if reason or graph is None:
            report.fault("images", name, reason)
            report.drop_image(split, name, "picture or graph that cannot be used")
            continue
        report.kept[split] += 1
        report.notes[_NOTE] = report.notes.get(_NOTE, 0) + turned
        yield line
    if split == "train" and not report.kept[split]:
        raise PrepareError(f"{root}: no image with a usable graph beside it (scene.png and scene.json); {report.why()}")


def _named(path: Path) -> str:
    """A path as printable text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
