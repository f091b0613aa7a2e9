"""Small Visual Genome sets in the published files' form, written by tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from sgg_fast.data.prepare.encode import Filters
from support import PUBLISHED

SAMPLE = PUBLISHED / "visual_genome_v1.2_sample"
"""Real annotations of five images; read where they lie."""
LOW = Filters(min_object_instances=2, min_attribute_instances=2, min_relation_instances=2, max_objects=4,
              max_relations=2)  # fmt: skip


class VgSet:
    """The seven files; lists to fill, then `write`."""

    def __init__(self) -> None:
        self.image_data: list[Any] = []
        self.objects: list[Any] = []
        self.attributes: list[Any] = []
        self.relationships: list[Any] = []
        self.splits: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
        self.object_alias = "man,men,guy\n"
        self.relationship_alias = "on,stands on,ON TOP\n"

    def add(
        self,
        split: str,
        image_id: int,
        names: Sequence[str],
        relations: Sequence[tuple[int, str, int]] = (),
        attributes: dict[int, list[str]] | None = None,
        size: tuple[int, int] = (300, 240),
    ) -> None:
        """Image `image_id` with objects of ids 100 image_id + 0, 1, ... and boxes of 40 x 50 pixels."""
        self.splits[split].append(image_id)
        url = f"https://cs.stanford.edu/people/rak248/VG_100K_{image_id % 2 + 1}/{image_id}.jpg"
        self.image_data.append({"image_id": image_id, "width": size[0], "height": size[1], "url": url})
        objects = [
            {"object_id": 100 * image_id + k, "names": [name], "merged_object_ids": [], "synsets": [],
             "x": 10 * k, "y": 5 * k, "w": 40, "h": 50}
            for k, name in enumerate(names)
        ]  # fmt: skip
        self.objects.append({"image_id": image_id, "objects": objects})
        said = attributes or {}
        marked = [{**o, "attributes": said[k]} if k in said else dict(o) for k, o in enumerate(objects)]
        self.attributes.append({"image_id": image_id, "attributes": marked})
        rows = [
            {"relationship_id": 10 * image_id + k, "predicate": p, "subject": objects[s], "object": objects[o]}
            for k, (s, p, o) in enumerate(relations)
        ]
        self.relationships.append({"image_id": image_id, "relationships": rows})

    def object(self, image_id: int, k: int) -> dict[str, Any]:
        """Object k of an image, to be spoiled."""
        return next(r for r in self.objects if r["image_id"] == image_id)["objects"][k]

    def write(self, root: Path) -> Path:
        """All files in `root`, which is returned."""
        root.mkdir(parents=True, exist_ok=True)
        for name in ("image_data", "objects", "attributes", "relationships"):
            # Raw surrogates become the bytes that are not UTF-8.
            text = json.dumps(getattr(self, name), ensure_ascii=False)
            (root / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        (root / "object_alias.txt").write_bytes(self.object_alias.encode("utf-8", "surrogateescape"))
        (root / "relationship_alias.txt").write_text(self.relationship_alias)
        (root / "vg_splits.json").write_text(json.dumps(self.splits))
        return root


def plain_set(num_train: int = 4) -> VgSet:
    """Images that all pass `LOW`: ids 1 .. num_train, one of val (90) and one of test (91)."""
    vg = VgSet()
    for image_id in range(1, num_train + 1):
        vg.add("train", image_id, ("man", "tree", "sky"), ((0, "on", 1), (2, "above", 1)), {1: ["green", "tall"]})
    vg.add("val", 90, ("sky", "man", "tree"), ((1, "on", 2),))
    vg.add("test", 91, ("tree", "sky", "man"), ((1, "above", 0),))
    return vg


def draw_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Placeholders: a horizontal ramp of the given size at each path."""
    for k, (path, (width, height)) in enumerate(sorted(sizes.items())):
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        pixels = np.stack([np.tile(ramp, (height, 1))] * 3, axis=2)
        pixels[..., 2] = 40 * k % 256
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / path)


def load_by_facts(path: Path) -> list[dict[str, Any]]:
    """A split read by nothing but the description of sg2im's layout."""
    with h5py.File(path) as file:
        data = {key: file[key][()] for key in file}
    num = len(data["image_ids"])
    for key, array in data.items():
        assert key == "image_paths" or array.dtype == np.int32, key
        assert key == "object_attributes" or len(array) == num, key
    for key in ("object_ids", "object_names", "relationship_ids", "relationship_subjects", "relationship_predicates",
                "relationship_objects", "attributes_per_object"):  # fmt: skip
        assert data[key].ndim == 2
    images, row = [], 0
    for i in range(num):
        n, m = data["objects_per_image"][i], data["relationships_per_image"][i]
        attributes = []
        for k in range(n):
            count = data["attributes_per_object"][i, k]
            assert (data["object_attributes"][row, count:] == -1).all()
            attributes.append(data["object_attributes"][row, :count].tolist())
            row += 1
        for key in ("object_ids", "object_names", "object_boxes", "attributes_per_object"):
            assert (data[key][i, n:] == -1).all(), key
        for key in ("ids", "subjects", "predicates", "objects"):
            assert (data[f"relationship_{key}"][i, m:] == -1).all(), key
        ends = [data[f"relationship_{key}"][i, :m].tolist() for key in ("ids", "subjects", "predicates", "objects")]
        images.append({
            "id": int(data["image_ids"][i]),
            "path": data["image_paths"][i].decode(),
            "ids": data["object_ids"][i, :n].tolist(),
            "names": data["object_names"][i, :n].tolist(),
            "boxes": data["object_boxes"][i, :n].tolist(),
            "relations": list(zip(*ends, strict=True)),
            "attributes": attributes,
        })  # fmt: skip
    assert row == len(data["object_attributes"])
    return images


real = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no {SAMPLE}")


def sample_root(folder: Path, splits: dict[str, list[int]]) -> Path:
    """The sample's files, linked, beside alias files and splits of ours."""
    folder.mkdir()
    for path in SAMPLE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "object_alias.txt").write_text("tree,trees\nwindow,windows\nbuilding,buildings\n")
    (folder / "relationship_alias.txt").write_text("on,on top of\nhas,has a\n")
    (folder / "vg_splits.json").write_text(json.dumps(splits))
    return folder
