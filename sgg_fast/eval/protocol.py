"""`--protocol paper`: FID and IS under settings that are fixed, printed and written down, so figures compare.

The paper (Wang et al., AAAI-25) fixes the test splits and DDIM with 100 steps. It is silent about guidance, pictures a
graph, resizing and the reference pictures; they are fixed here. The dry form (`--dry`) runs the same code with the
toy's features and two steps. Letters: G test graphs, H = W = resolution in pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from sgg_fast.config import DataConfig
from sgg_fast.data import jsonl
from sgg_fast.data.sources import PairSource, open_source
from sgg_fast.data.stored import is_cache
from sgg_fast.digests import sha256_of
from sgg_fast.drawing.models import load_model, made_scheduler
from sgg_fast.eval import distances, pictures, report
from sgg_fast.eval.pictures import EvalJob, noise_seed
from sgg_fast.eval.published import COCO, LAION, PUBLISHED, TABLE_1, VG
from sgg_fast.graph import SceneGraph

MANIFEST = "manifest.json"
FORMAT = "sgg_fast protocol 1"
KINDS = {"coco": COCO, "laion-sg": LAION}
"""Names of the sets in set.json and in the published tables."""
TEST_IMAGES = {VG: 5_096, COCO: 2_048, LAION: 50_000}
"""Test images of the published splits after preparation."""
DRY = "DRY RUN: toy features and two steps; these figures compare with nothing"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that changes the figures, apart from the model and the set."""

    split: str = "test"
    """P: the published test split, every graph of it."""
    images_per_graph: int = 1
    seed: int = 0
    """Picture i starts from noise of seed + i."""
    sampler: str = "ddim"
    """P."""
    eta: float = 0.0
    steps: int = 100
    """P."""
    guidance: float = 7.5
    max_objects: int | None = None
    """Most objects of a graph; None for all. SGDiff's and sg2im's loaders draw ten."""
    resizing: str = ""
    """How real pictures become H x W."""
    network_input: str = (
        "uint8 RGB, 0..255, at H x W; torch-fidelity resizes to 299 x 299 as TensorFlow 1 does and scales once"
    )
    reference: str = "the real pictures of the same test graphs, one each, in order"


RESIZING = {
    "squash": "whole picture to H x W, proportions change; Pillow, bilinear, antialiased (as sg2im resizes)",
    "crop": "largest centred square to H x W; Pillow, bilinear, antialiased",
}


class Pictures(Sequence[np.ndarray]):
    """Pictures that are read on request: uint8 [H, W, 3]."""

    def __init__(self, read: Callable[[Any], np.ndarray], places: Sequence[Any]) -> None:
        self.read, self.places = read, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> Pictures: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | Pictures:
        if isinstance(index, slice):
            return Pictures(self.read, self.places[index])
        return self.read(self.places[index])


def drawn_objects(graph: SceneGraph, most: int, index: int) -> SceneGraph:
    """At most `most` objects of a graph with the relations among them: those that have relations first.

    sg2im's loader (which SGDiff uses) draws ten at random at each access; here graph `index` has one fixed draw. Order
    of objects is kept.
    """
    num = len(graph.objects)
    if num <= most:
        return graph
    related = sorted({end for s, _, o in graph.relations for end in (s, o)})
    rng = np.random.default_rng([most, index])
    if len(related) >= most:
        kept = rng.permutation(related)[:most]
    else:
        alone = np.setdiff1d(np.arange(num), related)
        kept = np.concatenate([related, rng.permutation(alone)[: most - len(related)]])
    place = {int(old): new for new, old in enumerate(np.sort(kept))}
    relations = tuple((place[s], p, place[o]) for s, p, o in graph.relations if s in place and o in place)
    return SceneGraph(tuple(graph.objects[i] for i in place), relations)


def open_test(data: str, resolution: int) -> tuple[PairSource, str, str]:
    """(test split, name of the set, rule of resizing) of a prepared set. Raises ValueError naming --data."""
    folder = Path(data)
    again = "give the folder that `python -m sgg_fast.data.prepare vg, coco or laion-sg` wrote"
    if not folder.is_dir() or is_cache(folder):
        raise ValueError(f"--data {data}: --protocol paper needs the prepared set and its pictures, no cache; {again}")
    config = DataConfig(source=data, resolution=resolution)
    if (folder / "test.h5").is_file():
        return open_source(config, seed=0, split="test"), VG, "squash"
    header = jsonl.read_header(folder, "test") if jsonl.is_set(folder) else {}
    if not (folder / "test.jsonl").is_file():
        raise ValueError(f"--data {data}: holds no test split; {again}")
    return open_source(config, seed=0, split="test"), KINDS.get(header["kind"], header["kind"]), header["resize"]


def run(args: argparse.Namespace) -> str:
    """Draw what is missing, compare, write manifest.json and table.md to --out; returns the text.

    Raises ValueError or OSError for unusable input.
    """
    model = load_model(args.model)
    pipeline = model.pipeline
    side = int(pipeline.config.resolution)
    source, name, rule = open_test(args.data, side)
    graphs = [source.graphs[i] for i in range(source.num_images)]
    if args.max_objects is not None:
        graphs = [drawn_objects(graph, args.max_objects, i) for i, graph in enumerate(graphs)]
    protocol = Protocol(max_objects=args.max_objects, resizing=RESIZING[rule], steps=2 if args.dry else Protocol.steps)
    warnings = [DRY] if args.dry else distances.check_inception(args.inception, len(graphs), len(graphs))
    if not args.dry and len(graphs) != TEST_IMAGES.get(name):
        warnings.append(f"{name}: {len(graphs)} test images where the published split has {TEST_IMAGES.get(name)}")
    pipeline.scheduler = made_scheduler(pipeline, protocol.sampler)
    print(_told(protocol, model.description, name, side, len(graphs)), flush=True)
    fixed, asked = dataclasses.asdict(protocol), graphs_sha256(graphs)
    pictures.check_settings(args.out, {"model": model.weights, "graphs": asked, "features": _features(args), **fixed})
    folder = args.out / "pictures"
    paths = [folder / f"{i:06d}.png" for i in range(len(graphs))]
    jobs = [EvalJob(path, graphs[i], noise_seed(0, protocol.seed + i)) for i, path in enumerate(paths)]
    pictures.draw_missing(pipeline, jobs, protocol.steps, protocol.guidance)
    drawn = Pictures(lambda path: pictures.load([path])[0], paths)
    real = Pictures(source.load_image, range(len(graphs)))
    if args.dry:
        figures = distances.toy_crowd(drawn, real)
    else:
        figures = distances.inception_distances(drawn, real, args.inception)
    found = {
        "format": FORMAT,
        "dry": args.dry,
        "protocol": fixed,
        "model": {"description": model.description, "sha256": model.weights},
        "set": {"name": name, "folder": str(args.data), "resolution": side, "test graphs": len(graphs)},
        "graphs sha256": asked,
        "features": _features(args),
        "figures": figures,
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "warnings": warnings,
        "drawn pixels sha256": pixels_sha256(drawn),
        "real pixels sha256": pixels_sha256(real),
        "pairs": list(_pairs(source, paths, graphs, args.out)),
    }
    text = "\n\n".join([table(found), *(f"WARNING: {warning}" for warning in warnings)])
    report.write_json(args.out / MANIFEST, found)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    return f"{text}\n\n{args.out / MANIFEST}\n{args.out / 'table.md'}"


def _told(protocol: Protocol, model: str, name: str, side: int, num: int) -> str:
    """The fixed settings, one a line."""
    rows = {"model": model, "set": f"{name}, {num} test graphs, {side} x {side}", **dataclasses.asdict(protocol)}
    return "protocol paper\n" + "\n".join(f"  {key.replace('_', ' ')}: {value}" for key, value in rows.items())


def _features(args: argparse.Namespace) -> dict[str, str | bool]:
    """The network behind the figures, and the SHA-256 of its file."""
    if args.dry:
        from sgg_fast.toy.features import FILE, ToyFeatures

        return {"network": ToyFeatures.name, "file": FILE.name, "sha256": sha256_of(FILE), "published": False}
    digest = sha256_of(args.inception)
    return {
        "network": "Inception 2015-12-05 by torch-fidelity",
        "file": args.inception.name,
        "sha256": digest,
        "published": digest.startswith(distances.INCEPTION_SHA256),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("sgg_fast", "torch", "torch-fidelity", "diffusers", "numpy", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def graphs_sha256(graphs: Sequence[SceneGraph]) -> str:
    """SHA-256 of the graphs in order, as they are drawn."""
    whole = hashlib.sha256()
    for graph in graphs:
        whole.update(json.dumps([graph.objects, graph.relations]).encode() + b"\n")
    return whole.hexdigest()


def pixels_sha256(images: Sequence[np.ndarray]) -> str:
    """SHA-256 of the pixels that are compared, in order."""
    whole = hashlib.sha256()
    for i in range(len(images)):
        whole.update(np.ascontiguousarray(images[i]).data)
    return whole.hexdigest()


def _pairs(
    source: PairSource, paths: Sequence[Path], graphs: Sequence[SceneGraph], out: Path
) -> Iterator[dict[str, str | int]]:
    """One entry a test graph: its real picture, its drawn one, its size."""
    assert source.place is not None
    for i, path in enumerate(paths):
        yield {
            "real": source.place(i).name,
            "drawn": str(path.relative_to(out)),
            "objects": len(graphs[i].objects),
            "relations": len(graphs[i].relations),
        }


def table(found: Mapping[str, Any]) -> str:
    """The published figures and this run's, as a table with a column for each published set and resolution."""
    cell, figures = (found["set"]["name"], found["set"]["resolution"]), found["figures"]
    methods = {name: entry.figures for name, entry in PUBLISHED.items()}
    methods["this run"] = {cell: (figures["FID"], figures["IS"])}
    cells = dict.fromkeys(itertools.chain.from_iterable(methods.values()))
    rows = {
        method: {f"{at[0]} {at[1]}": " / ".join(map(_number, values[at])) if at in values else "-" for at in cells}
        for method, values in methods.items()
    }
    notes = [
        f"- {method}: {entry.source} (unverified): {entry.note}"
        for method, entry in PUBLISHED.items()
        if not entry.verified
    ]
    said = f"{figures['drawn pictures']} drawn against {figures['real pictures']} real pictures, {figures['features']}"
    return "\n".join([
        report.table(rows, "FID / IS"), "",
        f"- this run: {said}; IS is the mean of {distances.IS_SPLITS} parts, their standard deviation "
        f"{_number(figures['IS standard deviation'])}",
        f"- other rows: {TABLE_1}, unless named below", *notes,
    ])  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"
