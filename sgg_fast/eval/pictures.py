"""The evaluated graphs and their pictures: drawn once, kept as PNG, so an evaluation can be stopped and continued.

Letters: S seeds, G graphs, H, W = size in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from sgg_fast.config import DataConfig
from sgg_fast.data.cache import to_bytes, to_pixels
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.png_record import save_png
from sgg_fast.data.sources import open_source
from sgg_fast.eval import metrics
from sgg_fast.files import write_text
from sgg_fast.graph import SceneGraph
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.toy.world import Scene

_AGAIN = "delete it, and the same command draws it again"
_FEW = 4
_KINDS = ("", "-combinations", "-repeats")
_TOY = tuple(f"{world}{kind}" for world in ("toy", "toy-words") for kind in _KINDS)
_SCAN = 80
"""Toy graphs searched for each requested counterfactual pair."""


@dataclasses.dataclass(frozen=True)
class GraphSet:
    """Graphs to draw, and their real pictures if there are any."""

    name: str
    graph: Callable[[int], SceneGraph]
    image: Callable[[int], np.ndarray] | None
    """Index -> uint8 [H, W, 3]."""
    size: int | None
    """Number of graphs; None for an endless set."""
    turned: set[int] = dataclasses.field(default_factory=set)
    """Real pictures that were turned upright when they were read (`PairSource.turned`)."""
    scan: int = _SCAN
    """Graphs searched for each counterfactual pair of an endless set."""


def open_graphs(data: str, resolution: int) -> GraphSet:
    """Open a set of graphs.

    "toy": held-out scenes; "toy-combinations": scenes with a combination of `world.HELD_OUT`; "toy-repeats": held-out
    scenes that are hard to put in words (`_repeats`). Each also exists for "toy-words", the world in everyday words.
    Other sets: a JSON file of graphs, or a training set, whose test split is read. Raises ValueError naming --data.
    """  # fmt: skip
    if data.endswith("-repeats") and data in _TOY:
        repeats = _repeats(resolution, is_spoken(data))
        return GraphSet(data, lambda i: repeats(i).graph, lambda i: repeats(i).image, None, scan=1)
    if data in _TOY:
        from sgg_fast.toy.world import HELD_OUT_SEED, draw_scene

        held_out, spoken = is_unseen(data), is_spoken(data)
        scene = functools.lru_cache(maxsize=None)(
            lambda i: draw_scene(HELD_OUT_SEED, i, resolution, held_out=held_out, spoken=spoken)
        )
        return GraphSet(data, lambda i: scene(i).graph, lambda i: scene(i).image, None)
    path = Path(data)
    if path.is_file():
        graphs = load_scene_graphs(path)
        return GraphSet(str(path), graphs.__getitem__, None, len(graphs))
    if not path.is_dir():
        raise ValueError(f"--data {data}: neither {' nor '.join(_TOY)}, and there is no such file or folder")
    source = open_source(DataConfig(source=data, resolution=resolution), seed=0, split="test")
    return GraphSet(source.name, source.graphs.__getitem__, source.load_image, source.num_images, source.turned)


def is_spoken(data: str) -> bool:
    """Whether a set of graphs is of `toy-words`."""
    return data.startswith("toy-words") and data in _TOY


def is_unseen(data: str) -> bool:
    """Whether every scene of a set has a combination of `world.HELD_OUT`."""
    return data.endswith("-combinations") and data in _TOY


@functools.cache
def _repeats(resolution: int, spoken: bool = False) -> Callable[[int], Scene]:
    """Index -> the held-out scene of that number among the scenes whose graph has three properties.

    Two objects have one name. There is a chain: the object of one relation is the subject of another. One relation
    could also hold the other way round.
    """
    from sgg_fast.toy.world import HELD_OUT_SEED, draw_scene

    found: list[Scene] = []
    looked = itertools.count()

    def scene(index: int) -> Scene:
        while len(found) <= index:
            i = next(looked)
            drawn = draw_scene(HELD_OUT_SEED, i, resolution, spoken=spoken)
            graph = drawn.graph
            alike = len(set(graph.objects)) < len(graph.objects)
            chain = {s for s, _, _ in graph.relations} & {o for _, _, o in graph.relations}
            if alike and chain and metrics.counterfactual_pairs(i, graph):
                found.append(drawn)
        return found[index]

    return scene


@dataclasses.dataclass(frozen=True)
class EvalJob:
    """One picture to draw."""

    path: Path
    graph: SceneGraph
    noise_seed: int


def noise_seed(seed: int, index: int) -> int:
    """Noise seed of graph `index` under `seed`; its counterfactuals start from the same noise."""
    return seed * 1_000_003 + index


def graphs_digest(graph_set: GraphSet) -> str:
    """Digest of the graphs, so the pictures of a file are not used after the file was edited.

    It covers all graphs of a finite set, and the first few of an endless one, which change with the world that draws
    them.
    """
    digest = hashlib.sha256()
    for i in range(_FEW if graph_set.size is None else graph_set.size):
        graph = graph_set.graph(i)
        digest.update(repr((graph.objects, graph.relations)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Record in `out` the settings of its pictures. Raises ValueError if it holds pictures of other settings."""
    path = out / "settings.json"
    if path.is_file():
        # Defaults for folders older than these settings; their graphs are unknown.
        older = {"relation_guidance": 0.0, "scheduler": "ddim", "graphs": settings.get("graphs")}
        try:
            there = older | json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; give another --out, or delete {out}") from error
        for key, value in settings.items():
            if there.get(key) != value:
                raise ValueError(f"--out {out} holds pictures with {key} {there.get(key)}, not {value}: give another")
        return
    write_text(path, json.dumps(settings, indent=2) + "\n")


def draw_missing(
    pipeline: SceneGraphToImagePipeline,
    jobs: Sequence[EvalJob],
    steps: int,
    guidance: float,
    batch_size: int = 16,
    relation_guidance: float = 0.0,
) -> int:
    """Draw the pictures that are missing, each file whole or not at all; returns the number saved.

    A batch is drawn again whole: a picture drawn in another batch differs by rounding, and a run that was stopped is to
    end in the same bytes. Raises `NotFiniteError` for a batch with NaN or Inf, of which no picture is saved.
    """
    missing = {job.path for job in jobs if not job.path.is_file()}
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="draw", unit="picture", disable=None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            if missing.isdisjoint(job.path for job in batch):
                continue
            images = pipeline(
                [job.graph for job in batch],
                num_inference_steps=steps,
                guidance_scale=guidance,
                relation_guidance=relation_guidance,
                generator=[torch.Generator().manual_seed(job.noise_seed) for job in batch],
            ).images
            for job, image in zip(batch, images, strict=True):
                if job.path in missing:
                    save_png(image, job.path, None)
                    bar.update()
    return len(missing)


def load(paths: Sequence[Path]) -> np.ndarray:
    """uint8 [len(paths), H, W, 3]. Raises ValueError naming a picture that cannot be read or has another size."""
    images: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # border: Pillow raises anything on a damaged file
            raise ValueError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
        if images[-1].shape != images[0].shape:
            (h, w), (first_h, first_w) = images[-1].shape[:2], images[0].shape[:2]
            raise ValueError(f"{path}: is {w} x {h} pixels where the others are {first_w} x {first_h}; {_AGAIN}")
    return np.stack(images)


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """uint8 pictures [M, H, W, 3] through an autoencoder (posterior mean) and back. Raises `NotFiniteError`."""
    parts = []
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size], vae.device).to(vae.dtype)
        parts.append(to_bytes(vae.decode(vae.encode(pixels).latent_dist.mean).sample.float()))
    return np.concatenate(parts)
