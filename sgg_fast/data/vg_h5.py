"""Writes and reads sg2im's files of Visual Genome, {train,val,test}.h5 and vocab.json, which SGDiff also reads.

Letters: M images, O most objects, R most relations and A most attributes (30 each in sg2im), K objects of all images.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sgg_fast import digests
from sgg_fast.config import ConfigError
from sgg_fast.data.images import stays_inside
from sgg_fast.data.layouts import clean_name
from sgg_fast.graph import SceneGraph, SceneGraphError

logger = logging.getLogger(__name__)

VOCABULARY = ("object", "attribute", "pred")
"""Kinds of names: vocab.json holds `<kind>_name_to_idx` and `<kind>_idx_to_name` of each."""
DIGESTS = "sha256.json"
"""File with the SHA-256s of the files of `prepare vg`; sets of other tools have none."""
_READ = ("image_ids", "image_paths", "object_names", "objects_per_image", "relationship_subjects",
         "relationship_predicates", "relationship_objects", "relationships_per_image")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VgImage:
    """One image in the files' representation."""

    image_id: int
    path: str
    """Path relative to the folder of images, with forward slashes."""
    objects: np.ndarray
    """int32 [n, 6]: object id, index of the name, box x, y, w, h in pixels."""
    relations: np.ndarray
    """int32 [m, 4]: relation id, subject, index of the predicate, object; objects by their index in the image."""
    attributes: list[list[int]]
    """Indices of the attributes of each object."""


def write_split(
    path: Path, images: Sequence[VgImage], max_objects: int, max_relations: int, max_attributes: int
) -> None:
    """Write one .h5 in sg2im's layout: int32, padded with -1. The same images give the same bytes."""
    num = len(images)

    def padded(*shape: int) -> np.ndarray:
        return np.full((num, *shape), -1, np.int32)

    objects, relations = padded(max_objects, 6), padded(max_relations, 4)
    attributes_per_object = padded(max_objects)
    attributes = np.full((sum(len(image.objects) for image in images), max_attributes), -1, np.int32)
    row = 0
    for i, image in enumerate(images):
        objects[i, : len(image.objects)] = image.objects
        relations[i, : len(image.relations)] = image.relations
        for k, ids in enumerate(image.attributes):
            attributes_per_object[i, k] = len(ids)
            attributes[row, : len(ids)] = ids
            row += 1
    arrays = {
        "image_ids": np.array([image.image_id for image in images], np.int32),
        "object_ids": objects[:, :, 0],
        "object_names": objects[:, :, 1],
        "object_boxes": objects[:, :, 2:],
        "objects_per_image": np.array([len(image.objects) for image in images], np.int32),
        "relationship_ids": relations[:, :, 0],
        "relationship_subjects": relations[:, :, 1],
        "relationship_predicates": relations[:, :, 2],
        "relationship_objects": relations[:, :, 3],
        "relationships_per_image": np.array([len(image.relations) for image in images], np.int32),
        "attributes_per_object": attributes_per_object,
        "object_attributes": attributes,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        paths = file.create_dataset("image_paths", (num,), dtype=h5py.string_dtype())
        for i, image in enumerate(images):
            paths[i] = image.path


def read_vocabulary(path: Path) -> dict[str, list[str]]:
    """Names by index of each kind: "object", "attribute" (if present), "pred". Raises `ConfigError`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not usable JSON: {error}") from error
    names = {}
    for kind in VOCABULARY:
        found = document.get(f"{kind}_idx_to_name") if isinstance(document, dict) else None
        if found is None and kind == "attribute":
            found = []
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ConfigError(f"{path}: {kind}_idx_to_name must be a list of names, as sg2im writes it")
        names[kind] = found
    return names


def write_digests(folder: Path, names: Sequence[str]) -> None:
    """Write DIGESTS for these files of `folder`."""
    text = json.dumps({name: digests.sha256_of(folder / name) for name in names}, indent=1) + "\n"
    (folder / DIGESTS).write_text(text, encoding="ascii")


def check_digests(folder: Path, names: Sequence[str]) -> None:
    """Raises `ConfigError` if a file differs from the output of `prepare vg`; sets of other tools pass."""
    path = folder / DIGESTS
    if not path.is_file():
        return
    cure = f"prepare the set again (--overwrite), or, if you changed it on purpose, delete {DIGESTS}"
    try:
        known = json.loads(path.read_text(encoding="utf-8-sig"))
        wrong = digests.changed(folder, {name: known.get(name) for name in names if (folder / name).is_file()})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {cure}") from error
    if wrong:
        raise ConfigError(f"{folder / wrong}: its bytes are not those that were written (SHA-256 differs); {cure}")


def read_split(
    path: Path, vocabulary: dict[str, list[str]], first_attribute: bool = False
) -> tuple[list[SceneGraph], list[str]]:
    """All graphs of an .h5 and their image paths, with all objects and relations in the file's order.

    Self-loops and exact duplicates are skipped with one warning. `first_attribute` puts each object's first attribute
    in front of its name. Raises `ConfigError` naming file, row and reason.
    """
    arrays = _read_arrays(path, (*_READ, "attributes_per_object", "object_attributes") if first_attribute else _READ)
    paths = [_path_of(path, i, raw) for i, raw in enumerate(arrays.pop("image_paths").tolist())]
    graphs, loops, repeats, start = [], 0, 0, 0
    for i in range(len(paths)):
        where = f"{path}: row {i} (image {int(arrays['image_ids'][i])})"
        num = _size(arrays["objects_per_image"][i], arrays["object_names"].shape[1], f"{where}: objects_per_image")
        names = _names(arrays["object_names"][i, :num], vocabulary["object"], f"{where}: object_names")
        if first_attribute:
            per_object = arrays["attributes_per_object"][i, :num]
            firsts = arrays["object_attributes"][start : start + num, 0]
            start += num
            for k in np.flatnonzero(per_object > 0).tolist():
                (attribute,) = _names(firsts[k : k + 1], vocabulary["attribute"], f"{where}: object_attributes")
                names[k] = f"{attribute} {names[k]}"
        most = arrays["relationship_subjects"].shape[1]
        num = _size(arrays["relationships_per_image"][i], most, f"{where}: relationships_per_image")
        predicates = _names(arrays["relationship_predicates"][i, :num], vocabulary["pred"], f"{where}: predicates")
        ends = (arrays[f"relationship_{role}s"][i, :num].tolist() for role in ("subject", "object"))
        triples = [(s, p, o) for s, p, o in zip(next(ends), predicates, next(ends), strict=True)]
        kept = dict.fromkeys(triple for triple in triples if triple[0] != triple[2])
        own_loops = sum(s == o for s, _, o in triples)
        loops, repeats = loops + own_loops, repeats + len(triples) - own_loops - len(kept)
        try:
            graphs.append(SceneGraph(tuple(names), tuple(kept)))
        except SceneGraphError as error:
            raise ConfigError(f"{where}: {error}") from error
    if loops or repeats:
        logger.warning("%s: left out: %d relations of an object to itself, %d duplicates", path, loops, repeats)
    return graphs, paths


def read_boxes(path: Path) -> np.ndarray:
    """int32 [M, O, 4]: x, y, w, h in pixels of a split, padded with -1; objects in the order of `read_split`."""
    boxes = _read_arrays(path, ("image_ids", "object_boxes"))["object_boxes"]
    assert isinstance(boxes, np.ndarray)
    return boxes


def _read_arrays(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The datasets `keys` in memory. Raises `ConfigError`, also if their lengths do not fit together."""
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise ConfigError(f"{path}: not of sg2im's layout: {', '.join(missing)} missing; prepare it again")
            arrays = {key: np.asarray(file[key][()]) for key in keys}
    except ConfigError:
        raise
    except Exception as error:  # border: h5py raises anything on a damaged file, MemoryError included
        raise ConfigError(f"{path}: cannot be read as HDF5: {error}; prepare it again") from error
    num = len(arrays["image_ids"]) if arrays["image_ids"].ndim == 1 else -1
    for key, array in arrays.items():
        flat = key in ("image_ids", "image_paths", "objects_per_image", "relationships_per_image")
        whole = array.ndim == (1 if flat else 3 if key == "object_boxes" else 2) and (
            key == "image_paths" or array.dtype.kind in "iu"
        )
        if not whole or (key != "object_attributes" and len(array) != num):
            raise ConfigError(f"{path}: {key} is {array.dtype} {list(array.shape)}, which does not fit {num} images")
    widths = [arrays[key].shape[1] for key in keys if key.startswith("relationship_")]
    if len(set(widths)) > 1:
        raise ConfigError(f"{path}: the arrays of relationships have room for {widths}, which must be one number")
    if "object_boxes" in arrays and arrays["object_boxes"].shape[2] != 4:
        raise ConfigError(f"{path}: object_boxes must have four numbers a box")
    if "object_attributes" in arrays and not arrays["object_attributes"].shape[1]:
        raise ConfigError(f"{path}: object_attributes has no room for an attribute")
    if "object_attributes" in arrays and len(arrays["object_attributes"]) != arrays["objects_per_image"].sum():
        raise ConfigError(f"{path}: object_attributes does not have one row an object")
    if num == 0:
        raise ConfigError(f"{path}: holds no image")
    return arrays


def _path_of(path: Path, row: int, raw: object) -> str:
    """An image path, which h5py gives as bytes."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else str(raw)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: row {row}: image_paths is not UTF-8") from error
    if not stays_inside(text):
        raise ConfigError(f"{path}: row {row}: image path {text!r} leaves the folder of the images")
    return text


def _size(value: np.integer, most: int, where: str) -> int:
    if not 0 <= value <= most:
        raise ConfigError(f"{where}: {value}, but there is room for {most}")
    return int(value)


def _names(ids: np.ndarray, names: list[str], where: str) -> list[str]:
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(names):
        bad = ids[(ids < 0) | (ids >= len(names))][0]
        raise ConfigError(
            f"{where}: index {bad}, but vocab.json has {len(names)} names: they are not of one preparation"
        )
    try:
        return [_cleaned(names[i]) for i in ids.tolist()]
    except SceneGraphError as error:
        raise ConfigError(f"{where}: {error}; prepare the set again, which leaves such names out") from error


@functools.lru_cache(maxsize=1 << 16)
def _cleaned(name: str) -> str:
    """`clean_name` with a cache: a vocabulary's few names occur millions of times."""
    return clean_name(name, "vocab.json")
