"""`prepare check`: looks at a download in a minute, before a preparation of minutes and a cache of hours.

It reads heads and tails of the large files, the small files whole, and the lists of the image folders. It opens no
picture and does not parse the large files; `prepare` does that.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sgg_fast.data.prepare import coco, vg
from sgg_fast.data.prepare.encode import described_image
from sgg_fast.data.prepare.records import FaultError, PrepareError, is_id, stream, stream_lists
from sgg_fast.data.prepare.vocabulary import GET

HEAD = 200
"""Records read from the beginning of a large file."""
VG_IMAGES = 108_077
"""Records of Visual Genome's image_data.json (Wang et al., Datasets)."""
COCO_IMAGES = {"train": 118_287, "val": 5_000}
"""Images of COCO 2017."""
COCO_LISTED = {"train": 40_000, "val": 5_000}
"""Ids in the lists of the first stuff challenge."""
_TAIL = 64


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the check."""

    verdict: str
    """"ok", "WRONG", or "differs" for a count that is not the published one."""
    what: str
    said: str

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.what}: {self.said}"


def check(root: Path, images: Path | None = None, any_version: bool = False) -> Iterator[Finding]:
    """Findings about Visual Genome's or COCO-Stuff's files in `root`, as they are made. Raises `PrepareError`.

    images: folder of VG_100K and VG_100K_2 (default: ROOT/images), or of train2017 and val2017 (default: ROOT).
    """
    if not root.is_dir():
        raise PrepareError(f"{root}: there is no such folder")
    places = (root, root / "annotations")
    names = {path.name.removesuffix(".zip") for place in places if place.is_dir() for path in place.iterdir()}
    is_vg = any(name in names for name in vg.FILES)
    is_coco = any(f"{kind}_{split}2017.json" in names for kind in ("instances", "stuff") for split in ("train", "val"))
    if is_vg == is_coco:
        what = "both sets; give each its own folder" if is_vg else "neither set's annotation files"
        raise PrepareError(f"{root}: holds {what}; Visual Genome: {vg.SOURCES}; COCO-Stuff: {coco.SOURCES}")
    yield from _check_vg(root, images, any_version) if is_vg else _check_coco(root, images)


def _check_vg(root: Path, images: Path | None, any_version: bool) -> Iterator[Finding]:
    there = []
    for name in vg.FILES:
        finding = _file(root / name, vg.SOURCES, "[" if name.endswith(".json") and name != "vg_splits.json" else "")
        yield finding
        there += [name] if finding.verdict == "ok" else []
    for name, key in (("objects.json", "objects"), ("relationships.json", "relationships")):
        if name in there:
            yield _vg_version(root / name, key, any_version)
    if not {"image_data.json", "vg_splits.json"} <= set(there):
        return
    described: dict[int, str] = {}
    num = 0
    for record in stream(root / "image_data.json"):
        num += 1
        try:
            described[record["image_id"]] = described_image(record)[2]
        except (FaultError, KeyError, TypeError):
            continue
    yield _count("image_data.json", num, VG_IMAGES, "images")
    splits = vg.read_splits(root / "vg_splits.json")
    yield Finding("ok", "vg_splits.json", ", ".join(f"{split} {len(ids)}" for split, ids in splits.items()) + " images")
    listed = [i for ids in splits.values() for i in ids]
    unknown = [i for i in listed if i not in described]
    yield Finding(
        "WRONG" if len(unknown) * 100 > len(listed) else "ok", "splits",
        f"{len(listed) - len(unknown)} of {len(listed)} images have a usable record in image_data.json",
    )  # fmt: skip
    wanted = [described[i] for i in listed if i in described]
    yield from _pictures(images or root / "images", wanted, "images.zip and images2.zip, unpacked there")


def _vg_version(path: Path, key: str, any_version: bool) -> Finding:
    """Whether the first records have the field that version 1.4 added."""
    for record in itertools.islice(stream(path), HEAD):
        parts = record.get(key) if isinstance(record, dict) else None
        for part in parts if isinstance(parts, list) else ():
            ends = (part, part.get("subject"), part.get("object")) if isinstance(part, dict) else ()
            if any(isinstance(end, dict) and "merged_object_ids" in end for end in ends):
                return Finding("ok", path.name, "version 1.4")
    said = f"an earlier version than 1.4 (no merged_object_ids in the first {HEAD} records); get {GET}"
    return Finding("differs" if any_version else "WRONG", path.name, said)


def _check_coco(root: Path, images: Path | None) -> Iterator[Finding]:
    for split in ("train", "val"):
        described: dict[int, str] = {}
        for kind in ("instances", "stuff"):
            name = f"{kind}_{split}2017.json"
            path = coco.find_file(root, name) or root / "annotations" / name
            finding = _file(path, coco.SOURCES, "{")
            yield finding
            if finding.verdict != "ok":
                continue
            found = _coco_images(path)
            if kind == "instances":
                described = found
            yield _count(name, len(found), COCO_IMAGES[split], "images")
        name = f"{coco.LISTS}/{split}-ids.txt"
        ids_path = coco.find_file(root, name) or root / "annotations" / name
        finding = _file(ids_path, coco.SOURCES, "")
        yield finding
        if finding.verdict != "ok":
            continue
        ids = coco.read_ids(ids_path)
        yield _count(name, len(ids), COCO_LISTED[split], "ids")
        if described:
            wanted = [f"{split}2017/{described[i]}" for i in ids if i in described]
            yield from _pictures(images or root, wanted, f"{split}2017.zip, unpacked there")


def _coco_images(path: Path) -> dict[int, str]:
    """Image id -> file name, from the list `images`, which comes before the annotations."""
    found: dict[int, str] = {}
    for key, record in stream_lists(path):
        if key == "annotations":
            break
        if key == "images" and isinstance(record, dict) and is_id(record.get("id")):
            found[record["id"]] = str(record.get("file_name"))
    return found


def _file(path: Path, sources: str, first: str) -> Finding:
    """Presence, size and, for JSON that begins with `first`, a whole end."""
    if not path.is_file():
        packed = path.with_name(f"{path.name}.zip")
        cure = f"unpack {packed}" if packed.is_file() else f"get it: {sources}"
        return Finding("WRONG", path.name, f"missing in {path.parent}; {cure}")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_TAIL).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(max(0, size - _TAIL))
        tail = file.read().rstrip()
    last = {"[": b"]", "{": b"}"}.get(first, b"")
    if not head or (first and not (head.startswith(first.encode()) and tail.endswith(last))):
        return Finding("WRONG", path.name, f"{size} bytes, cut or not JSON: download it again")
    return Finding("ok", path.name, f"{size / 1e6:.1f} MB")


def _count(name: str, found: int, published: int, what: str) -> Finding:
    if found == published:
        return Finding("ok", name, f"{found} {what}")
    return Finding("differs", name, f"{found} {what} where the published file has {published}")


def _pictures(root: Path, wanted: Iterable[str], source: str) -> Iterator[Finding]:
    """Whether every listed picture lies in its folder, by the folders' lists."""
    by_folder: dict[str, list[str]] = {}
    for path in wanted:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, []).append(name)
    for folder, names in sorted(by_folder.items()):
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(root / folder)}
        except OSError as error:
            yield Finding("WRONG", f"{root / folder}", f"{error.strerror or error}; it holds {source}")
            continue
        missing = [name for name in names if not sizes.get(name)]
        said = f"{len(names) - len(missing)} of {len(names)} listed pictures"
        if missing:
            said += f"; missing or empty: {', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}"
            yield Finding("WRONG", f"{root / folder}", f"{said}; it holds {source}")
        else:
            yield Finding("ok", f"{root / folder}", said)


def told(findings: Iterable[Finding], any_size: bool, say: Callable[[str], Any]) -> str:
    """Say every finding; returns the reason to stop, or ""."""
    wrong, differs = 0, 0
    for finding in findings:
        say(str(finding))
        wrong += finding.verdict == "WRONG"
        differs += finding.verdict == "differs"
    if wrong:
        return f"{wrong} findings are WRONG: mend them before `prepare`"
    if differs and not any_size:
        return f"{differs} counts or versions differ from the published ones: download again, or go on with --any-size"
    return ""
