"""Small prepared sets and caches, and pictures that cannot be used, written by tests."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgg_fast.config import Config, DataConfig
from sgg_fast.data import jsonl
from sgg_fast.data.prepare.cache import write_cache
from sgg_fast.data.prepare.job import CacheJob
from sgg_fast.data.prepare.report import Report
from sgg_fast.data.sources import PairSource, open_source
from sgg_fast.files import LOCK

SIDE = 32
"""Resolution of the small caches."""


def draw(folder: Path, num: int, size: tuple[int, int] = (48, 40)) -> list[str]:
    """`num` pictures of smooth noise, p0.png, p1.png, ...; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"p{i}.png")
    return [f"p{i}.png" for i in range(num)]


def records(names: list[str]) -> list[dict[str, Any]]:
    """A line of a set for each image: three objects, two relations; the fourth object's name is the image's own."""
    return [
        {"id": i, "image": name, "objects": ["sheep", "grass", f"thing {i % 5}"],
         "relationships": [[0, "left of", 2], [0, "standing on", 1]],
         "boxes": [[4, 10, 12, 12], [0, 20, 48, 20], [30, 8, 10, 14]]}
        for i, name in enumerate(names)
    ]  # fmt: skip


def write_small(folder: Path, num: int = 12) -> Path:
    """A prepared set of `num` images."""
    rows = records(draw(folder / "images", num))
    jsonl.write_set(folder, {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}\n")
    return folder


def derived(names: list[str]) -> list[dict[str, Any]]:
    """The same with relations to be drawn from boxes."""
    rng = np.random.default_rng(3)
    return [
        {**{k: v for k, v in row.items() if k != "relationships"}, "size": [48, 40],
         "centres": rng.uniform(0.1, 0.9, (3, 2)).round(3).tolist()}
        for row in records(names)
    ]  # fmt: skip


def small_source(data: Path, check: bool = True, **changes: Any) -> PairSource:
    """A set at `SIDE`, opened."""
    return open_source(DataConfig(source=str(data), **{"resolution": SIDE, **changes}), seed=0, check=check)


def small_job(data: Path, out: Path, shard_size: int = 5, batch_size: int = 4, **changes: Any) -> CacheJob:
    """The preparation of such a set, in several shards."""
    made = Config().replace(**{"data": str(data), "resolution": SIDE, **changes})
    return CacheJob(made.model, made.data, 0, out, shard_size=shard_size, batch_size=batch_size)


def cache_of(data: Path, out: Path, shard_size: int = 5, batch_size: int = 4, **changes: Any) -> Path:
    """A cache with several shards, made here and now."""
    quiet = {"say": lambda line: None}
    write_cache(small_job(data, out, shard_size, batch_size, **changes), **quiet)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file but the lock, which names a process."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != LOCK}


def png_of(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    """A PNG by its own chunks: `depth` bits a channel of colour type `kind`, black; of any claimed size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = {0: 1, 2: 3, 6: 4}[kind]
    rows = min(height, 64) * (b"\0" + bytes(min(width, 64) * channels * depth // 8))
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def unusable() -> dict[str, tuple[bytes, str]]:
    """File name -> (content, what the reason says)."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))

    def saved(image: Image.Image, form: str, **how: Any) -> bytes:
        held = io.BytesIO()
        image.save(held, form, **how)
        return held.getvalue()

    jpeg, alpha = saved(picture, "JPEG"), picture.convert("RGBA")
    alpha.putpixel((3, 3), (1, 2, 3, 254))
    return {
        "zero.jpg": (b"", "the file is empty"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut_early.jpg": (jpeg[:30], "cannot be read as an image"),
        "cut.png": (saved(picture, "PNG")[:-400], "cannot be read as an image"),
        "cmyk.jpg": (saved(picture.convert("CMYK"), "JPEG"), "CMYK"),
        "deep_grey.png": (saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), "more than 8 bits"),
        "deep_rgb.png": (png_of(9, 9, depth=16), "more than 8 bits"),
        "clear.png": (saved(alpha, "PNG"), "transparent pixels"),
        "text.png": (b"not a picture", "cannot be read as an image"),
        "bomb.png": (png_of(60_000, 60_000), "too large"),
        "large.png": (png_of(12_000, 8_000), "too large"),
    }


def dump(path: Path, content: Any) -> Path:
    """JSON where raw surrogates become the bytes that are not UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape"))
    return path


def write_graph(path: Path, *names: str) -> None:
    """A graph file: the first object is near the second."""
    path.write_text(json.dumps({"objects": list(names), "relationships": [[0, "near", 1]]}))


def lines(out: Path, split: str = "train") -> list[dict[str, Any]]:
    """Every record of a split of a prepared set."""
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def faults(report: Report) -> dict[tuple[str, str], list[str]]:
    """(file, reason) -> the places that a report names."""
    return {(fault["file"], fault["reason"]): fault["where"] for fault in report.document()["faults"]}


def tagged(path: Path, orientation: int) -> np.ndarray:
    """A picture, red left and blue right when upright, stored as a camera that was held so; its upright pixels."""
    upright = np.zeros((24, 48, 3), np.uint8)
    upright[:, :24, 0], upright[:, 24:, 2] = 255, 255
    undo = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    picture, exif = Image.fromarray(upright), Image.Exif()
    picture = picture if undo[orientation] is None else picture.transpose(undo[orientation])
    exif[0x0112] = orientation
    picture.save(path, quality=100, subsampling=0, exif=exif)
    return upright


def laion_root(root: Path) -> Path:
    """LAION-SG's file of six images, without pictures."""
    rows = [
        {"img_id": str(k), "name": f"{k}.jpg", "items": [{"item_id": 0, "label": "river", "attributes": ["wide"]},
                                                         {"item_id": 1, "label": "hill", "attributes": []}],
         "relations": [{"triple_id": 0, "item1": 0, "relation": "below", "item2": 1}]}
        for k in range(6)
    ]  # fmt: skip
    dump(root / "train.json", rows)
    return root


def own_root(root: Path) -> Path:
    """Four pictures with a graph beside each."""
    for name in draw(root, 4):
        dump((root / name).with_suffix(".json"), {"objects": ["sheep", "grass"], "relationships": [[0, "on", 1]]})
    return root
