"""The toy world in the form of the published files, so the preparation and readers run without a download.

    python -m sgg_fast.toy.sets vg --out toy_vg --num 300      # what `prepare vg` reads
    python -m sgg_fast.toy.sets coco --out toy_coco --num 300  # what `prepare coco` reads

A pure function of its arguments, to the byte. Letters: H = W = size of a picture in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.toy import world

SIZE = 320
"""Resolution in pixels: the smallest objects are larger than the 32 px that Visual Genome's boxes must have."""
STUFF = ("sky", "grass", "sea", "sand", "snow", "leaves", "flowers")
"""Categories that COCO calls stuff: no instances, regions only."""
FIRST_STUFF, OTHER = 92, 183
"""COCO-Stuff's category ids: stuff from 92 on, and "other", for every pixel of a thing."""
LISTS = "deprecated-challenge2017"


def _scenes(seed: int, num: int, size: int) -> Iterator[tuple[int, world.Scene]]:
    """(image id from 1 on, scene)."""
    for i in tqdm(range(num), desc="draw", disable=None, unit="image", leave=False):
        yield i + 1, world.draw_scene(seed, i, size)


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=92)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def write_vg(out: Path, num: int, seed: int = 0, size: int = SIZE) -> None:
    """Visual Genome's seven files and images/VG_100K; colours are attributes. 80 % train, 10 % val, the rest test."""
    lists: dict[str, list[Any]] = {name: [] for name in ("image_data", "objects", "attributes", "relationships")}
    relation_id = 0
    for image_id, scene in _scenes(seed, num, size):
        name = f"VG_100K/{image_id}.jpg"
        _save(scene.image, out / "images" / name)
        url = f"https://example.org/toy/{name}"
        lists["image_data"].append({"image_id": image_id, "width": size, "height": size, "url": url})
        objects: list[dict[str, Any]] = []
        marked: list[dict[str, Any]] = []
        for k, (words, box) in enumerate(zip(scene.graph.objects, scene.boxes, strict=True)):
            colour, _, category = words.rpartition(" ")
            x0, y0, x1, y1 = (round(float(v) * size) for v in box)
            record = {"object_id": 100 * image_id + k, "names": [category], "synsets": [], "merged_object_ids": [],
                      "x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0}  # fmt: skip
            objects.append(record)
            marked.append({**record, "attributes": [colour]} if colour else record)
        relations = []
        for s, predicate, o in scene.graph.relations:
            relation_id += 1
            ends = {role: {**objects[k], "name": objects[k]["names"][0]} for role, k in (("subject", s), ("object", o))}
            relations.append({"relationship_id": relation_id, "predicate": predicate, "synsets": [], **ends})
        lists["objects"].append({"image_id": image_id, "objects": objects})
        lists["attributes"].append({"image_id": image_id, "attributes": marked})
        lists["relationships"].append({"image_id": image_id, "relationships": relations})
    for name, records in lists.items():
        _write_json(out / f"{name}.json", records)
    (out / "object_alias.txt").write_text("person,man,woman\n")
    (out / "relationship_alias.txt").write_text("left of,to the left of\nright of,to the right of\n")
    first, second = num * 8 // 10, num * 9 // 10
    splits = {"train": (1, first), "val": (first + 1, second), "test": (second + 1, num)}
    _write_json(out / "vg_splits.json", {split: list(range(a, b + 1)) for split, (a, b) in splits.items()})


def write_coco(out: Path, num: int, seed: int = 0, size: int = SIZE) -> None:
    """COCO-Stuff's annotation files, id lists, train2017/ and val2017/. 80 % train."""
    things = [name for name in world.OBJECTS if name not in STUFF]
    ids = {name: k for k, name in enumerate(things, start=1)}
    ids |= {name: k for k, name in enumerate(STUFF, start=FIRST_STUFF)}
    first = num * 8 // 10
    files: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):
        for kind, names in (("instances", things), ("stuff", [*STUFF, "other"])):
            categories = [{"supercategory": kind, "id": ids.get(name, OTHER), "name": name} for name in names]
            files[f"{kind}_{split}2017"] = {"info": {"description": "toy world"}, "licenses": [], "images": [],
                                            "annotations": [], "categories": categories}  # fmt: skip
    for image_id, scene in _scenes(seed, num, size):
        split = "train" if image_id <= first else "val"
        name = f"{image_id:012d}.jpg"
        _save(scene.image, out / f"{split}2017" / name)
        record = {"id": image_id, "file_name": name, "width": size, "height": size}
        own = {kind: files[f"{kind}_{split}2017"] for kind in ("instances", "stuff")}
        for file in own.values():
            file["images"].append(record)
        other_HW = np.zeros((size, size), bool)
        for words, mask_HW in zip(scene.graph.objects, scene.masks, strict=True):
            category = words.rpartition(" ")[2]
            kind = "stuff" if category in STUFF else "instances"
            _annotate(own[kind]["annotations"], image_id, ids[category], mask_HW, polygons=kind == "instances")
            other_HW |= mask_HW & (kind == "instances")
        if other_HW.any():
            _annotate(own["stuff"]["annotations"], image_id, OTHER, other_HW, polygons=False)
    for name, file in files.items():
        _write_json(out / "annotations" / f"{name}.json", file)
    for split, (a, b) in {"train": (1, first), "val": (first + 1, num)}.items():
        path = out / "annotations" / LISTS / f"{split}-ids.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{image_id}\n" for image_id in range(a, b + 1)))


def _annotate(rows: list[Any], image_id: int, category: int, mask_HW: np.ndarray, polygons: bool) -> None:
    """One annotation in COCO's form: things as polygons, stuff as run lengths."""
    rle = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    segmentation = _rectangles(mask_HW) if polygons else {"size": rle["size"], "counts": rle["counts"].decode()}
    rows.append({
        "id": len(rows) + 1, "image_id": image_id, "category_id": category,
        "iscrowd": 0, "area": int(mask_HW.sum()), "bbox": [float(v) for v in coco_mask.toBbox(rle)],
        "segmentation": segmentation,
    })  # fmt: skip


def _rectangles(mask_HW: np.ndarray) -> list[list[float]]:
    """A mask as polygons: its runs of pixels; equal runs in consecutive rows are merged."""
    open_runs: dict[tuple[int, int], int] = {}
    done: list[list[float]] = []
    empty = np.zeros(mask_HW.shape[1], bool)
    for y, row_W in enumerate([*mask_HW, empty]):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row_W, [False]]).astype(np.int8)))
        runs = {(int(a), int(b)) for a, b in edges.reshape(-1, 2)}
        for run in [run for run in open_runs if run not in runs]:
            x0, x1, top = *run, open_runs.pop(run)
            done.append([float(v) for v in (x0, top, x1, top, x1, y, x0, y)])
        for run in sorted(runs):
            open_runs.setdefault(run, y)
    return done


@command("toy.sets")
def main(argv: list[str] | None) -> None:
    """Exit code 0, or 2 for unusable settings."""
    parser = OneLineParser(prog="python -m sgg_fast.toy.sets", description=__doc__)
    parser.add_argument("form", choices=("vg", "coco"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--num", type=int, default=300, help="images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the world (%(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side (%(default)s)")
    args = parser.parse_args(argv)
    if args.num < 10 or args.size < 64 or args.seed < 0:
        raise ValueError("--num must be at least 10, --size at least 64, --seed not negative")
    write = write_vg if args.form == "vg" else write_coco
    write(args.out, args.num, args.seed, args.size)
    least = max(1, args.num // 50)
    how = {
        "vg": f"--min-object-instances {least} --min-attribute-instances {least} --min-relation-instances {least} "
        f"--images {args.out / 'images'}",
        "coco": f"--num-val {args.num // 10} --num-test {args.num // 10} --images {args.out}",
    }[args.form]
    out = args.out.with_name(f"{args.out.name}_set")
    print(f"next: python -m sgg_fast.data.prepare {args.form} --root {args.out} --out {out} {how}")
