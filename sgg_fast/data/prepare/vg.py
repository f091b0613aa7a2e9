"""`prepare vg`: checks the input files, runs the encoder, moves the result to OUT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgg_fast.data.jsonl import link_images
from sgg_fast.data.prepare.encode import Encoder, Filters
from sgg_fast.data.prepare.place import preparing
from sgg_fast.data.prepare.records import PrepareError, read_json
from sgg_fast.data.prepare.report import Report
from sgg_fast.data.prepare.vocabulary import compare
from sgg_fast.data.vg_h5 import DIGESTS, VgImage, write_digests, write_split
from sgg_fast.files import write_together

FILES = ("objects.json", "attributes.json", "relationships.json", "image_data.json", "object_alias.txt",
         "relationship_alias.txt", "vg_splits.json")  # fmt: skip
PAPER = {"train": 62_565, "val": 5_062, "test": 5_096}
"""Images of each split after preparation (Wang et al., AAAI-25, Datasets)."""
RESULT = ("train.h5", "val.h5", "test.h5", "report.json", DIGESTS, "vocab.json")
"""vocab.json is moved in last and removed first: a folder with it is complete."""
SOURCES = (
    "annotations (version 1.4) and alias files: https://homes.cs.washington.edu/~ranjay/visualgenome/api.html; "
    "vg_splits.json: sg2im/data/vg_splits.json of https://github.com/google/sg2im"
)


def prepare(
    root: Path,
    out: Path,
    filters: Filters | None = None,
    compare_vocab: Path | None = None,
    any_version: bool = False,
    overwrite: bool = False,
    images: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Read `root` and write {train,val,test}.h5, vocab.json and report.json to `out`. Raises `PrepareError`.

    OUT/images becomes a link to `images`, the folder of VG_100K and VG_100K_2. `say` gets one line for each part of the
    work. Equal inputs give equal bytes.
    """
    filters = filters or Filters()
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        raise PrepareError(f"{root}: {', '.join(missing)} missing; {SOURCES}")
    splits = _splits(root / "vg_splits.json")
    published = compare_vocab or root / "vocab.json"
    known = read_json(published) if compare_vocab or published.is_file() else None
    report = Report({"root": str(root), "any_version": any_version, **dataclasses.asdict(filters)}, PAPER)
    with preparing(out, RESULT, overwrite, report, images):
        encoder = Encoder(root, filters, report, any_version)
        say("reading image_data.json and vg_splits.json")
        encoder.select_images(splits)
        if not any(image.split == "train" for image in encoder.images.values()):
            raise PrepareError(f"{root}: no training image passes the first filters: {report.why()}")
        say(
            f"{len(encoder.images)} images; reading their objects, relationships and attributes (minutes for the whole "
            "set)"
        )
        vocabulary = encoder.encode()
        if known is not None:
            report.vocabulary |= {"compared_with": str(published), "compared": compare(vocabulary, known, published)}
        kept = encoder.result()
        if not kept["train"]:
            raise PrepareError(f"{root}: no training image passes the filters: {report.why()}")
        _write(out, kept, vocabulary, report, filters, images)
    return report


def _splits(path: Path) -> dict[str, list[Any]]:
    """Image ids of the three splits."""
    document = read_json(path)
    if not isinstance(document, dict) or set(document) != set(PAPER):
        raise PrepareError(f"{path}: must be an object with the lists {', '.join(PAPER)}; {SOURCES}")
    for split in PAPER:
        if not isinstance(document[split], list):
            raise PrepareError(f"{path}: {split} must be a list of image ids")
    return {split: document[split] for split in PAPER}


def _write(
    out: Path,
    kept: dict[str, list[VgImage]],
    vocabulary: dict[str, Any],
    report: Report,
    filters: Filters,
    images: Path | None,
) -> None:
    """Write the set's files atomically."""
    with write_together(out, RESULT, lambda: link_images(out, images)) as aside:
        for split, rows in kept.items():
            write_split(aside / f"{split}.h5", rows, filters.max_objects, filters.max_relations, filters.max_attributes)
        (aside / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        write_digests(aside, [*(f"{split}.h5" for split in kept), "vocab.json"])
        (aside / "report.json").write_text(report.text(), encoding="ascii")
