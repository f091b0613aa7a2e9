"""Encodes Visual Genome's records as integers, in the order and by the rules of sg2im's scripts/preprocess_vg.py.

Objects, attributes and relationships are read twice each (count names, then encode). Only a few integers for each kept
object and relation stay in memory.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sgg_fast.data.images import stays_inside
from sgg_fast.data.prepare.records import (
    FaultError,
    PrepareError,
    checked_box,
    checked_id,
    checked_name,
    checked_text,
    is_id,
    is_name,
    place,
    stream,
)
from sgg_fast.data.prepare.report import Report
from sgg_fast.data.prepare.vocabulary import by_count, check_size, check_version, read_aliases, vocabulary_of
from sgg_fast.data.vg_h5 import VgImage
from sgg_fast.graph import IMAGE_OBJECT, IN_IMAGE, shown

OVERHANG = "boxes_kept_that_reach_over_the_edge"
ROUNDED = "boxes_rounded_to_whole_pixels"


def option(default: Any, text: str) -> Any:
    """A filter with its line in --help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Filters:
    """Filters; the defaults are sg2im's. `help` is the line in --help."""

    min_image_size: int = option(200, "least width and height of an image, px")
    min_object_instances: int = option(2000, "training instances that make an object name one of the vocabulary")
    min_attribute_instances: int = option(2000, "the same for an attribute")
    min_object_size: int = option(32, "least width and height of a box, px")
    min_objects: int = option(3, "least objects of an image")
    max_objects: int = option(30, "most objects of an image")
    min_relation_instances: int = option(500, "training relations, between kept objects, that make a predicate")
    min_relations: int = option(1, "least relations of an image")
    max_relations: int = option(30, "most relations of an image")
    max_attributes: int = option(30, "attributes taken of an object")
    names: str = option("sg2im", "how names are read: as sg2im does, or clean")

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 1 if name.startswith("max_") or name == "min_objects" else 0
            if name != "names" and value < least:
                raise PrepareError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for what in ("objects", "relations"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise PrepareError(f"--min-{what} {low} is more than --max-{what} {high}")


@dataclasses.dataclass
class ListedImage:
    """An image of the splits during filtering."""

    split: str
    width: int
    height: int
    path: str
    objects: np.ndarray | None = None
    """int32 [n, 6]: id, name, x, y, w, h of each kept object; None until objects.json has a record of the image."""
    relations: np.ndarray | None = None
    """int32 [m, 4]: id, subject, predicate, object of each kept relation."""
    attributes: dict[int, list[int]] | None = None
    """Object id -> attributes, for objects with attributes."""

    def object_ids(self) -> list[int]:
        """Ids of the kept objects, in order."""
        return [] if self.objects is None else self.objects[:, 0].tolist()


class Encoder:
    """One preparation. `images` holds the images that passed so far, in the order of the splits."""

    def __init__(self, root: Path, filters: Filters, report: Report, any_version: bool) -> None:
        self.root, self.filters, self.report, self.any_version = root, filters, report, any_version
        self.images: dict[int, ListedImage] = {}
        self.clean = filters.names == "clean"
        self.object_aliases = read_aliases(root / "object_alias.txt", self.clean, report)
        self.relation_aliases = read_aliases(root / "relationship_alias.txt", self.clean, report)

    def select_images(self, splits: dict[str, list[Any]]) -> None:
        """Keep the images of the splits that image_data.json describes and that are large enough."""
        described, faulty = self._image_data()
        taken: set[int] = set()
        for split, ids in splits.items():
            self.report.listed[split] = len(ids)
            for image_id in ids:
                reason = ""
                if not is_id(image_id):
                    reason = "not an image id"
                elif image_id in taken:
                    reason = "listed twice in the splits"
                elif image_id not in described:
                    reason = ("faulty" if image_id in faulty else "no") + " record in image_data.json"
                elif min(described[image_id][:2]) < self.filters.min_image_size:
                    reason = f"a side below {self.filters.min_image_size} px"
                if reason:
                    self.report.drop_image(split, image_id if is_id(image_id) else shown(image_id), reason)
                else:
                    self.images[image_id] = ListedImage(split, *described[image_id])
                taken.update([image_id] if is_id(image_id) else [])

    def _image_data(self) -> tuple[dict[int, tuple[int, int, str]], set[int]]:
        """(image id -> width, height and path; ids with an unusable record)."""
        described: dict[int, tuple[int, int, str]] = {}
        faulty: set[int] = set()
        for number, record in enumerate(stream(self.root / "image_data.json")):
            where = f"record {number}"
            try:
                image_id = checked_id(record, "image_id", "record")
                where = place(image_id)
                if image_id in described or image_id in faulty:
                    raise FaultError("image id occurs again")
                faulty.add(image_id)
                described[image_id] = _described(record)
                faulty.remove(image_id)
            except FaultError as fault:
                self.report.fault("image_data.json", where, str(fault))
        return described, faulty

    def _records(self, name: str, key: str, report: Report | None) -> Iterator[tuple[int, list[Any]]]:
        """(image id, its list `key`) from the first record of every selected image, in the order of the file."""
        seen: set[int] = set()
        for number, record in enumerate(stream(self.root / name)):
            where = f"record {number}"
            try:
                key_of_id = "id" if isinstance(record, dict) and "image_id" not in record else "image_id"
                image_id = checked_id(record, key_of_id, "record")
                where = place(image_id)
                if image_id in seen:
                    raise FaultError("image id occurs again")
                seen.add(image_id)
                if not isinstance(record.get(key), list):
                    raise FaultError(f"record without a list of {key}")
            except FaultError as fault:
                if report:
                    report.fault(name, where, str(fault))
                continue
            if image_id in self.images:
                yield image_id, record[key]
        if not seen:
            raise PrepareError(f"{self.root / name}: no record has an image_id; is it Visual Genome's {name}?")

    def encode(self) -> dict[str, Any]:
        """Read the files; returns vocab.json's content."""
        counted = by_count(self._count_objects(), self.filters.min_object_instances)
        objects = [IMAGE_OBJECT, *filter(is_name, counted)]
        attributes = by_count(self._count_attributes(), self.filters.min_attribute_instances)
        self._encode_objects({name: i for i, name in enumerate(objects)})
        counts = self._count_predicates()
        # sg2im keeps predicates in order of first occurrence, not by count.
        least = self.filters.min_relation_instances
        predicates = [IN_IMAGE, *(p for p, count in counts.items() if count >= least and is_name(p))]
        vocabulary = vocabulary_of(objects, attributes, predicates)
        check_size(vocabulary, self.filters == Filters(), self.any_version, self.report)
        self._encode_relations({name: i for i, name in enumerate(predicates)})
        self._encode_attributes({name: i for i, name in enumerate(attributes)})
        self.report.vocabulary["names"] = {
            "objects": len(objects) - 1, "predicates": len(predicates) - 1, "attributes": len(attributes),
        }  # fmt: skip
        return vocabulary

    def _object_name(self, name: str) -> str:
        name = name.lower().strip() if self.clean else name
        return self.object_aliases.get(name, name)

    def _count_objects(self) -> Counter[str]:
        """Counts of names of training objects of every size, as in sg2im; an object counts once for each name."""
        counter: Counter[str] = Counter()
        merged = False
        for image_id, objects in self._records("objects.json", "objects", None):
            merged = merged or any(isinstance(o, dict) and "merged_object_ids" in o for o in objects)
            for record in objects if self.images[image_id].split == "train" else ():
                try:
                    counter.update(list(dict.fromkeys(self._object_name(name) for name in _object_names(record))))
                except FaultError:
                    continue  # reported when the objects are encoded
        check_version("objects.json", merged, self.any_version, self.report)
        return counter

    def _encode_objects(self, index: dict[str, int]) -> None:
        """Encode objects with a known name and a large enough box. First reason counts: fault, name, size."""
        filters, report, notes = self.filters, self.report, Counter[str]()
        for image_id, records in self._records("objects.json", "objects", report):
            image = self.images[image_id]
            kept: list[tuple[int, ...]] = []
            taken: set[int] = set()
            for record in records:
                report.read_parts["objects"] += 1
                try:
                    object_id = checked_id(record, "object_id", "object")
                    if object_id in taken:
                        raise FaultError("object id occurs again in the image")
                    taken.add(object_id)
                    names = [self._object_name(name) for name in _object_names(record)]
                    box, over = checked_box(record, image.width, image.height, outside=not self.clean)
                except FaultError as fault:
                    what = record.get("object_id") if isinstance(record, dict) else record
                    report.fault("objects.json", place(image_id, "object", what), str(fault))
                    report.drop("objects", f"fault: {fault}")
                    continue
                name = next((name for name in names if name in index), None)
                if name is None:
                    report.drop("objects", f"name of fewer than {filters.min_object_instances} training instances")
                elif min(box[2:]) < filters.min_object_size:
                    report.drop("objects", f"box side below {filters.min_object_size} px")
                else:
                    kept.append((object_id, index[name], *map(round, box)))
                    notes[OVERHANG] += over
                    notes[ROUNDED] += any(value != int(value) for value in box)
            image.objects = np.array(kept, np.int32).reshape(-1, 6)
        report.notes |= {OVERHANG: notes[OVERHANG], **({ROUNDED: notes[ROUNDED]} if notes[ROUNDED] else {})}

    def _cleaned(self, text: str) -> str:
        text = text.lower().strip()
        return self.relation_aliases.get(text, text)

    def _count_predicates(self) -> Counter[str]:
        """Counts of predicates of training relations between kept objects, in order of first occurrence."""
        counter: Counter[str] = Counter()
        merged = False
        for image_id, relations in self._records("relationships.json", "relationships", None):
            image = self.images[image_id]
            kept = set(image.object_ids())
            for record in relations:
                merged = merged or _mentions_merging(record)
                try:
                    _, subject, predicate, obj = _relation(record)
                except FaultError:
                    continue  # reported when the relations are encoded
                if image.split == "train" and subject in kept and obj in kept:
                    counter[self._cleaned(predicate)] += 1
        check_version("relationships.json", merged, self.any_version, self.report)
        return counter

    def _encode_relations(self, index: dict[str, int]) -> None:
        """Encode relations of known predicates between kept objects. First reason counts: fault, end, predicate."""
        report, unread = self.report, 0
        for image_id, records in self._records("relationships.json", "relationships", report):
            image = self.images[image_id]
            position = {object_id: k for k, object_id in enumerate(image.object_ids())}
            kept: list[tuple[int, ...]] = []
            for record in records:
                report.read_parts["relations"] += 1
                try:
                    relation_id, subject, text, obj = _relation(record)
                except FaultError as fault:
                    what = record.get("relationship_id") if isinstance(record, dict) else record
                    report.fault("relationships.json", place(image_id, "relation", what), str(fault))
                    report.drop("relations", f"fault: {fault}")
                    continue
                # sg2im cleans predicates in training images only.
                predicate = self._cleaned(text) if self.clean or image.split == "train" else text
                if subject not in position or obj not in position:
                    report.drop("relations", "subject or object left out")
                elif predicate in index:
                    kept.append((relation_id, position[subject], index[predicate], position[obj]))
                else:
                    least = self.filters.min_relation_instances
                    report.drop("relations", f"predicate of fewer than {least} training relations")
                    unread += self._cleaned(text) in index
            image.relations = np.array(kept, np.int32).reshape(-1, 4)
        if not self.clean:
            report.notes["relations_of_val_and_test_lost_to_spelling_that_--names_clean_keeps"] = unread

    def _count_attributes(self) -> Counter[str]:
        counter: Counter[str] = Counter()
        for image_id, records in self._records("attributes.json", "attributes", None):
            for record in records if self.images[image_id].split == "train" else ():
                counter.update(list(dict.fromkeys(self._attributes(record))))
        return counter

    def _attributes(self, record: Any, where: str = "") -> list[str]:
        """Attributes of an object's record; faults are reported if `where` names the image."""
        found = record.get("attributes") if isinstance(record, dict) else None
        names: list[str] = []
        for value in found if isinstance(found, list) else []:
            try:
                name = checked_name(value, "attribute")
                names.append(name.lower().strip() if self.clean else name)
            except FaultError as fault:
                if where:
                    what = shown(record.get("object_id"))
                    self.report.fault("attributes.json", f"{where}, object {what}", str(fault))
        return names

    def _encode_attributes(self, index: dict[str, int]) -> None:
        """Encode known attributes of objects in passing images; an object's last record wins, as in sg2im."""
        for image_id, records in self._records("attributes.json", "attributes", self.report):
            image = self.images[image_id]
            image.attributes, kept = {}, set() if self._reason(image) else set(image.object_ids())
            for number, record in enumerate(records):
                try:
                    object_id = checked_id(record, "object_id", "object")
                except FaultError as fault:
                    self.report.fault("attributes.json", place(image_id, "record", number), str(fault))
                    continue
                known = [index[a] for a in self._attributes(record, place(image_id)) if a in index]
                image.attributes.pop(object_id, None)
                if object_id in kept and known:
                    image.attributes[object_id] = known[: self.filters.max_attributes]

    def result(self) -> dict[str, list[VgImage]]:
        """Images that pass the filters on their objects and relations, by split."""
        kept: dict[str, list[VgImage]] = {split: [] for split in self.report.paper}
        bare = 0
        for image_id, image in self.images.items():
            reason = self._reason(image)
            if reason:
                self.report.drop_image(image.split, image_id, reason)
                continue
            assert image.objects is not None
            relations = np.zeros((0, 4), np.int32) if image.relations is None else image.relations
            bare += image.attributes is None
            attributes = [(image.attributes or {}).get(object_id, []) for object_id in image.object_ids()]
            kept[image.split].append(VgImage(image_id, image.path, image.objects, relations, attributes))
        self.report.notes["images_kept_without_a_record_in_attributes.json"] = bare
        self.report.kept.update({split: len(images) for split, images in kept.items()})
        return kept

    def _reason(self, image: ListedImage) -> str:
        """The first filter that rejects the image, or ""."""
        filters = self.filters
        if image.objects is None:
            return "no record in objects.json"
        if len(image.objects) < filters.min_objects:
            return f"fewer than {filters.min_objects} objects"
        if len(image.objects) > filters.max_objects:
            return f"more than {filters.max_objects} objects"
        relations = 0 if image.relations is None else len(image.relations)
        if image.relations is None and filters.min_relations:
            return "no record in relationships.json"
        if relations < filters.min_relations:
            return f"fewer than {filters.min_relations} relations"
        return f"more than {filters.max_relations} relations" if relations > filters.max_relations else ""


def _described(record: dict[str, Any]) -> tuple[int, int, str]:
    """Width, height and path relative to the folder of images: the last two parts of the URL, as in sg2im."""
    width, height = record.get("width"), record.get("height")
    if not (is_id(width) and is_id(height) and width and height):
        raise FaultError("no usable width and height")
    url = checked_text(record.get("url"), "url")
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise FaultError("url that is not http")
    parts = (rest if separator else url).split("/")
    path = "/".join(parts[-2:])
    if not stays_inside(path) or (not separator and url.startswith("/")):
        raise FaultError("image path that is absolute or leaves its folder")
    if not parts[-1]:
        raise FaultError("url without a file name")
    return width, height, path


def _object_names(record: Any) -> list[str]:
    """Usable names of an object, the preferred name first. Raises `FaultError` if there is none."""
    names = record.get("names") if isinstance(record, dict) else None
    if not isinstance(names, list):
        has = ": it has name, in place of the list names" if isinstance(record, dict) and "name" in record else ""
        raise FaultError(f"object without names{has}")
    usable = [name for name in names if isinstance(name, str) and is_name(name)]
    return usable or [checked_name(name, "name") for name in names]


def _relation(record: Any) -> tuple[int, int, str, int]:
    """Relation id, subject's object id, predicate, object's object id. Raises `FaultError`."""
    relation_id = checked_id(record, "relationship_id", "relation")
    subject, obj = (checked_id(record.get(role), "object_id", role) for role in ("subject", "object"))
    return relation_id, subject, checked_name(record.get("predicate"), "predicate"), obj


def _mentions_merging(record: Any) -> bool:
    """True if an end of the relation has the field that version 1.4 added."""
    ends = (record.get(role) for role in ("subject", "object")) if isinstance(record, dict) else ()
    return any(isinstance(end, dict) and "merged_object_ids" in end for end in ends)
