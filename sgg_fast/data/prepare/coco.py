"""Turns COCO-Stuff's annotation files into {train,val,test}.jsonl: sg2im's filters, things and stuff together.

Files are read record by record, twice (categories follow the annotations that use them). Only a few numbers for each
kept object stay in memory. Relations are not written: a pure function of image id and epoch seed
(`sgg_fast/data/spatial.py`) draws them from boxes and mask centres when the set is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgg_fast.data import jsonl
from sgg_fast.data.images import stays_inside
from sgg_fast.data.prepare.encode import OVERHANG, option
from sgg_fast.data.prepare.masks import mask_centre
from sgg_fast.data.prepare.place import preparing
from sgg_fast.data.prepare.records import (
    FaultError,
    PrepareError,
    checked_id,
    checked_name,
    checked_text,
    is_id,
    place,
    stream_lists,
)
from sgg_fast.data.prepare.report import Report
from sgg_fast.graph import shown

PAPER = {"train": 24_972, "val": 1_024, "test": 2_048}
"""Images of each split after preparation, with the deprecated challenge's id lists (sg2im; Wang et al., AAAI-25)."""
WITHOUT_LISTS = 72_623
"""Training images from the final COCO-Stuff release without the lists."""
LISTS = "deprecated-challenge2017"
BOX_ONLY = "objects_without_a_mask_whose_box_is_used"
SOURCES = (
    "annotations_trainval2017.zip and stuff_annotations_trainval2017.zip (which has the id lists in "
    f"{LISTS}/) of https://cocodataset.org/#download"
)


@dataclasses.dataclass(frozen=True)
class CocoFilters:
    """Filters; the defaults are sg2im's. `help` is the line in --help."""

    min_object_share: float = option(0.02, "share of the image that a box must exceed")
    min_objects: int = option(3, "least objects of an image")
    max_objects: int = option(8, "most objects of an image")
    num_val: int = option(1024, "images of val2017 that are val, from the first")
    num_test: int = option(2048, "images of val2017 that are test, to the last")

    def __post_init__(self) -> None:
        if not 0 <= self.min_object_share < 1:
            raise PrepareError(f"--min-object-share must lie between 0 and 1, not {self.min_object_share}")
        if not 1 <= self.min_objects <= self.max_objects:
            raise PrepareError(f"--min-objects {self.min_objects} and --max-objects {self.max_objects} allow no image")
        if min(self.num_val, self.num_test) < 0:
            raise PrepareError("--num-val and --num-test must not be negative")


@dataclasses.dataclass
class _Image:
    width: int
    height: int
    path: str
    objects: list[tuple[str, list[float], list[float]]] = dataclasses.field(default_factory=list)
    """Name, box x, y, w, h in pixels, mask centre in shares of the image."""
    has_stuff: bool = False


def prepare(
    root: Path,
    out: Path,
    filters: CocoFilters | None = None,
    images: Path | None = None,
    all_images: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Read `root` and write the splits, set.json and report.json to `out`. Raises `PrepareError`.

    Equal inputs give equal bytes. OUT/images becomes a link to `images`, which holds train2017/ and val2017/.
    """
    filters = filters or CocoFilters()
    names = [f"{kind}_{split}2017.json" for split in ("train", "val") for kind in ("instances", "stuff")]
    found = {name: path for name in names if (path := _find(root, name))}
    if missing := [name for name in names if name not in found]:
        raise PrepareError(f"{root}: {', '.join(missing)} missing, there or in annotations/; {SOURCES}")
    lists = {split: _find(root, f"{LISTS}/{split}-ids.txt") for split in ("train", "val")}
    if None in lists.values() and not all_images:
        raise PrepareError(
            f"{root}: the id lists {LISTS}/{{train,val}}-ids.txt are missing: without them {WITHOUT_LISTS} training "
            f"images come out in place of the {PAPER['train']} that papers use; get {SOURCES}, or go on with "
            "--all-images"
        )
    listed = {split: None if all_images else _read_ids(path) for split, path in lists.items()}
    report = Report({"root": str(root), "all_images": all_images, **dataclasses.asdict(filters)}, PAPER)
    with preparing(out, jsonl.files_of(PAPER), overwrite, report, images):
        kept = {}
        for split in ("train", "val"):
            say(f"reading the annotations of {split}2017 (minutes for the whole set)")
            kept[split] = _Reader(split, found, filters, report).read(listed[split])
        if not kept["train"]:
            raise PrepareError(f"{root}: no training image passes the filters: {report.why()}")
        kept["val"], kept["test"] = _parted(kept["val"], filters, report)
        report.kept.update({split: len(records) for split, records in kept.items()})
        header = {"kind": "coco", "resize": "squash", "relations": "derived"}
        jsonl.write_set(out, header, kept, report.text, images)
    return report


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / "annotations" / name) if path.is_file()), None)


def _read_ids(path: Path | None) -> list[int]:
    """The ids of a file with one id a line. Raises `PrepareError` for other content."""
    assert path is not None
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"), start=1):
        text = line.strip()
        if text and not (text.isascii() and text.isdigit()):
            raise PrepareError(f"{path}: line {number}: not an image id: {shown(text)}")
        ids += [int(text)] if text else []
    return ids


def _parted(
    records: list[dict[str, Any]], filters: CocoFilters, report: Report
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(val, test) from the images of val2017: the first ones and, of the others, the last ones."""
    val, rest = records[: filters.num_val], records[filters.num_val :]
    test = rest[max(0, len(rest) - filters.num_test) :]
    report.listed["test"] = len(test)
    for record in test:
        report.drop_image("val", record["id"], "taken for test")
    for record in rest[: len(rest) - len(test)]:
        report.drop_image("val", record["id"], "between val and test")
    return val, test


class _Reader:
    """Reader of the files of train2017 or val2017."""

    def __init__(self, split: str, files: dict[str, Path], filters: CocoFilters, report: Report) -> None:
        self.split, self.filters, self.report = split, filters, report
        self.files = {kind: files[f"{kind}_{split}2017.json"] for kind in ("instances", "stuff")}
        self.images: dict[int, _Image] = {}

    def _fault(self, kind: str, where: str, reason: str) -> None:
        self.report.fault(self.files[kind].name, where, reason)

    def read(self, listed: list[int] | None) -> list[dict[str, Any]]:
        """Records of the images that pass the filters, in the order of the instances file."""
        described, names = self._describe()
        self._select(described, listed)
        for kind in ("instances", "stuff"):
            self._collect(kind, names[kind])
        records = []
        for image_id, image in self.images.items():
            if reason := self._reason(image):
                self.report.drop_image(self.split, image_id, reason)
                continue
            objects, boxes, centres = zip(*image.objects, strict=True)
            record = {
                "id": image_id, "image": image.path, "size": [image.width, image.height], "objects": objects,
                "boxes": boxes, "centres": centres,
            }  # fmt: skip
            if fault := jsonl.fault_of(record):
                self._fault("instances", place(image_id), fault)
                self.report.drop_image(self.split, image_id, "no graph can be made of it")
                continue
            records.append(record)
        return records

    def _describe(self) -> tuple[dict[int, _Image], dict[str, dict[int, str]]]:
        """Images of the instances file, and the category names of each file by id."""
        described: dict[int, _Image] = {}
        faulty: set[int] = set()
        names: dict[str, dict[int, str]] = {}
        for kind in ("instances", "stuff"):
            names[kind] = {}
            for key, record in stream_lists(self.files[kind]):
                if key == "categories":
                    self._category(kind, record, names[kind])
                elif key == "images" and kind == "instances":
                    self._describe_image(record, described, faulty)
            if not names[kind]:
                raise PrepareError(f"{self.files[kind]}: no usable category; is it COCO's file? {SOURCES}")
        self.faulty = faulty
        return described, names

    def _category(self, kind: str, record: Any, names: dict[int, str]) -> None:
        try:
            category = checked_id(record, "id", "category")
            if category in names:
                raise FaultError("category id occurs again")
            names[category] = checked_name(record.get("name"), "category name").strip()
        except FaultError as fault:
            self._fault(kind, f"category {shown(record.get('id') if isinstance(record, dict) else record)}", str(fault))

    def _describe_image(self, record: Any, described: dict[int, _Image], faulty: set[int]) -> None:
        where = "image without id"
        try:
            image_id = checked_id(record, "id", "image")
            where = place(image_id)
            if image_id in described or image_id in faulty:
                raise FaultError("image id occurs again")
            faulty.add(image_id)
            width, height = record.get("width"), record.get("height")
            if not (is_id(width) and is_id(height) and 0 < width * height < 2**31):
                raise FaultError("no usable width and height")
            name = checked_text(record.get("file_name"), "file_name")
            if not stays_inside(name):
                raise FaultError("image path that is absolute or leaves its folder")
            described[image_id] = _Image(width, height, f"{self.split}2017/{name}")
            faulty.remove(image_id)
        except FaultError as fault:
            self._fault("instances", where, str(fault))

    def _select(self, described: dict[int, _Image], listed: list[int] | None) -> None:
        """Keep the images of the list (all without a list), in the order of the instances file."""
        report, split = self.report, self.split
        if listed is None:
            report.listed[split] = len(described) + len(self.faulty)
            for image_id in self.faulty:
                report.drop_image(split, image_id, "faulty record of the image")
            self.images = described
            return
        report.listed[split] = len(listed)
        wanted: set[int] = set()
        for image_id in listed:
            if image_id in wanted:
                report.drop_image(split, image_id, "listed twice")
            elif image_id not in described:
                known = "faulty record of the image" if image_id in self.faulty else "no record of the image"
                report.drop_image(split, image_id, known)
            wanted.add(image_id)
        self.images = {image_id: image for image_id, image in described.items() if image_id in wanted}

    def _collect(self, kind: str, names: dict[int, str]) -> None:
        """Read the objects of one file. Each counts under its first reason: fault, size, category "other", mask."""
        report, seen = self.report, set()
        for key, record in stream_lists(self.files[kind]):
            if key != "annotations":
                continue
            image_id = record.get("image_id") if isinstance(record, dict) else None
            image = self.images.get(image_id) if isinstance(image_id, int) and is_id(image_id) else None
            if image is None and is_id(image_id):
                continue
            report.read_parts["objects"] += 1
            try:
                annotation = checked_id(record, "id", "annotation")
                checked_id(record, "image_id", "annotation")
                assert image is not None
                if annotation in seen:
                    raise FaultError("annotation id occurs again")
                seen.add(annotation)
                image.has_stuff |= kind == "stuff"
                name = names.get(checked_id(record, "category_id", "annotation"))
                if name is None:
                    raise FaultError("category that the file does not describe")
                box = _box(record.get("bbox"), image)
                if box[2] * box[3] / (image.width * image.height) <= self.filters.min_object_share:
                    report.drop("objects", f"box of at most {self.filters.min_object_share:g} of the image")
                elif name == "other":
                    report.drop("objects", 'category "other"')
                else:
                    centre = self._centre(kind, record, image, box, place(image_id, "annotation", annotation))
                    image.objects.append((name, box, [round(value, 6) for value in centre]))
                    over = box[0] < 0 or box[1] < 0 or box[0] + box[2] > image.width or box[1] + box[3] > image.height
                    report.notes[OVERHANG] = report.notes.get(OVERHANG, 0) + over
            except FaultError as fault:
                what = record.get("id") if isinstance(record, dict) else record
                self._fault(kind, place(image_id, "annotation", what), str(fault))
                report.drop("objects", f"fault: {fault}")

    def _centre(
        self, kind: str, record: dict[str, Any], image: _Image, box: list[float], where: str
    ) -> tuple[float, float]:
        """x and y of the mask's centre in shares of the image; without a mask those of the box, as in sg2im.

        An unreadable mask is reported, and the object is kept.
        """
        centre, mask, notes = None, record.get("segmentation"), self.report.notes
        if mask is None or mask == []:
            notes[BOX_ONLY] = notes.get(BOX_ONLY, 0) + 1
        else:
            try:
                centre = mask_centre(mask, image.width, image.height, lambda reason: self._fault(kind, where, reason))
            except FaultError as fault:
                self._fault(kind, where, f"{fault}; its box is used")
        return centre or ((box[0] + box[2] / 2) / image.width, (box[1] + box[3] / 2) / image.height)

    def _reason(self, image: _Image) -> str:
        """The first filter that rejects the image, or ""."""
        if not image.has_stuff:
            return "no stuff annotation"
        if len(image.objects) < self.filters.min_objects:
            return f"fewer than {self.filters.min_objects} objects"
        return f"more than {self.filters.max_objects} objects" if len(image.objects) > self.filters.max_objects else ""


def _box(value: Any, image: _Image) -> list[float]:
    """x, y, w, h in pixels. Raises `FaultError`."""
    if not isinstance(value, list) or len(value) != 4:
        raise FaultError("box that is not four numbers")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise FaultError("box that is not four numbers")
        if not abs(number) <= 2**31:  # NaN included
            raise FaultError("box with a coordinate that is not finite")
    x, y, w, h = value
    if w < 0 or h < 0 or x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
        raise FaultError("box outside the image")
    return value
