"""Sources of training pairs (image, scene graph); images are uint8 [R, R, 3] at the requested resolution R.

Letters: M images, D graphs (draws) of each image, S = D M samples: all images with draw 0, then with draw 1, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sgg_fast.config import ConfigError, DataConfig
from sgg_fast.data import jsonl
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.images import (
    IMAGE_ENDINGS,
    TURNED,
    boxes_in_square,
    graph_beside,
    open_rgb,
    original_and_crop,
    size_of,
    to_square,
)
from sgg_fast.data.packed import JoinedGraphs, OnRequest, PackedGraphs, PackedRows, PackedStrings
from sgg_fast.data.spatial import mirrored_graph
from sgg_fast.data.stored import StoredCache, is_cache
from sgg_fast.data.vg_h5 import check_digests, read_boxes, read_split, read_vocabulary
from sgg_fast.graph import GraphPacker, NameTable, SceneGraph, SceneGraphError


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Training pairs: graphs in memory, images on request."""

    graphs: Sequence[SceneGraph]
    """[S], ordered by draw, then by image."""
    load_image: Callable[[int], np.ndarray]
    """Index of an image (index of a sample modulo M) -> uint8 [R, R, 3]. Raises `ConfigError`."""
    name: str
    draws: int = 1
    """D, graphs of each image."""
    place: Callable[[int], Path] | None = None
    """File of each image; None for toy images."""
    boxes: Callable[[int], np.ndarray] | None = None
    """Index of an image -> float32 [N, 4]: x0, y0, x1, y1 of its objects in 0..1 of `load_image`'s picture."""
    sizes: Callable[[int], tuple[float, float, float, float]] | None = None
    """Index of an image -> `original_and_crop`; None if each picture is its own original."""
    stored: StoredCache | None = None
    """The prepared cache, if the source is one."""
    turned: set[int] = dataclasses.field(default_factory=set)
    """Images that `load_image` has turned upright so far, by their orientation tag."""

    def __len__(self) -> int:
        return len(self.graphs)

    @property
    def num_images(self) -> int:
        """M."""
        return len(self.graphs) // self.draws

    @property
    def said_turned(self) -> str:
        """A notice of the pictures in `turned`; "" for none."""
        return f"{self.name}: {len(self.turned)} pictures are turned as their orientation tag says" * bool(self.turned)

    def box_rows(self, images: Sequence[int]) -> np.ndarray | None:
        """[N, 4] boxes of the objects of the images' graphs in packed order; None without boxes. Each graph ends with
        the box of its image node, the whole picture; each draw repeats the boxes. Raises `ConfigError`.
        """
        if self.boxes is None:
            return None
        rows = []
        for index in images:
            found = self.boxes(index)
            if len(found) != len(self.graphs[index].objects):
                raise ConfigError(f"{self.name}: image {index} has {len(found)} boxes for its objects")
            rows += [found, np.array([[0, 0, 1, 1]], np.float32)]
        return np.tile(np.concatenate(rows).astype(np.float32), (self.draws, 1))

    def size_rows(self, images: Sequence[int]) -> np.ndarray:
        """[M, 4] fp32 original height and width, top and left of the crop of the images. Raises `ConfigError`."""
        if self.sizes is None:
            height, width, _ = self.load_image(images[0]).shape
            return np.tile(np.array([[height, width, 0, 0]], np.float32), (len(images), 1))
        return np.array([self.sizes(index) for index in images], np.float32)


def open_source(data: DataConfig, seed: int, split: str = "train", check: bool = True) -> PairSource:
    """The set of --data; `seed` is the seed of toy scenes.

    Raises `ConfigError` for an unusable set and, with `check`, for absent images.
    """
    data.check_given()
    folder, resolution = Path(data.source), data.resolution
    if data.is_drawn:
        source = toy_source(seed, data.num_scenes, resolution, data.source)
    elif is_cache(folder):
        return stored_source(folder, data)
    elif jsonl.is_set(folder):
        source = jsonl_source(folder, resolution, split, data.relation_draws, check)
    elif (folder / f"{split}.h5").is_file():
        source = vg_source(folder, resolution, split, data.attributes == "first", check)
    else:
        source = folder_source(folder, resolution, split)
    return with_mirrored(source) if data.flip == "swap" else source


CROWD = 6
"""Least number of things in a crowded scene."""


def toy_source(seed: int, num_scenes: int, resolution: int, data: str = "toy") -> PairSource:
    """The first `num_scenes` scenes of `seed`, of one of `DRAWN_SETS`; every third of "toy-rare" is a rare one, of
    "toy-words-mixed" a mixed one. "toy-words-crowded" is the latter, but every second scene has `CROWD` things or more,
    and "toy-words-spread" is that, but every fourth is a spread one."""
    from sgg_fast.toy.world import draw_scene

    own = {
        "toy-rare": {"rare": True},
        "toy-words": {"spoken": True},
        "toy-words-mixed": {"spoken": True, "mixed": True},
        "toy-words-crowded": {"spoken": True, "mixed": True},
        "toy-words-spread": {"spoken": True, "mixed": True},
    }.get(data, {})
    usual = {**own, "rare": False, "mixed": False}
    crowd = CROWD if data in ("toy-words-crowded", "toy-words-spread") else 0

    def kind(i: int) -> dict[str, bool]:
        if data == "toy-words-spread" and i % 4 == 1:
            return {**usual, "spread": True}
        return own if i % 3 == 2 else usual

    scenes = [draw_scene(seed, i, resolution, least=crowd * (i % 2), **kind(i)) for i in range(num_scenes)]
    name = f"{data}({num_scenes} scenes, seed {seed})"
    return PairSource([s.graph for s in scenes], lambda i: scenes[i].image, name, boxes=lambda i: scenes[i].boxes)


def folder_source(folder: Path, resolution: int, split: str = "train") -> PairSource:
    """Images of `folder` with a graph file of the same stem; upright, centre-cropped squares, antialiased."""
    if (folder / "vocab.json").is_file():
        raise ConfigError(f"--data {folder}: has a vocab.json and no {split}.h5; give a split that is there, "
                          "or prepare the set again")  # fmt: skip
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    pairs = [(picture, graph) for picture in images if (graph := graph_beside(picture))]
    if not pairs:
        raise ConfigError(f"--data {folder}: no image with a graph beside it (scene.png and scene.json)")
    graphs = []
    for picture, file in pairs:
        found = load_scene_graphs(file)
        if len(found) != 1:
            raise SceneGraphError(f"{file}: must hold one graph, that of {picture.name}")
        graphs += found
    places, turned = [picture for picture, _ in pairs], set[int]()
    return PairSource(
        graphs,
        lambda i: to_square(_upright(places[i], i, turned), resolution, "crop"),
        str(folder),
        place=lambda i: places[i],
        sizes=lambda i: original_and_crop(size_of(places[i], upright=True), resolution, "crop"),
        turned=turned,
    )


def _upright(path: Path, index: int, turned: set[int]) -> Image.Image:
    """The picture, upright; its index joins `turned` if its tag turned it."""
    image = open_rgb(path, upright=True)
    turned.update([index] if image.info[TURNED] else [])
    return image


def vg_source(
    folder: Path, resolution: int, split: str = "train", first_attribute: bool = False, check: bool = True
) -> PairSource:
    """SPLIT.h5 and vocab.json of `folder` in sg2im's layout, with images in FOLDER/images or else in FOLDER.

    As in sg2im the whole picture is resized to the square, bilinear and antialiased: proportions change, but no object
    of the graph is cut off. Every object and relation is taken; sg2im draws ten objects at each access. Raises
    `ConfigError` for unusable files and, with `check`, for missing images.
    """
    file = folder / f"{split}.h5"
    check_digests(folder, (file.name, "vocab.json"))
    graphs, relative = read_split(file, read_vocabulary(folder / "vocab.json"), first_attribute)
    held: list[np.ndarray] = []

    def boxes_of(index: int) -> np.ndarray:
        held.extend([] if held else [read_boxes(file)])
        return held[0][index, : len(graphs[index].objects)]

    return _files_source(folder, f"{folder} ({split})", relative, graphs, boxes_of, resolution, "squash", check)


def jsonl_source(folder: Path, resolution: int, split: str = "train", draws: int = 1, check: bool = True) -> PairSource:
    """SPLIT.jsonl of a prepared set, with images in FOLDER/images or else in FOLDER, resized by set.json's rule.

    An image has `draws` graphs if relations are derived from boxes, else one. Raises `ConfigError`.
    """
    header = jsonl.read_header(folder, split)
    draws = draws if header.get("relations") == "derived" else 1
    file, table, boxes, all_boxed = folder / f"{split}.jsonl", NameTable(), PackedRows(4), True
    packers = [GraphPacker(table) for _ in range(draws)]

    def images() -> Iterator[str]:
        nonlocal all_boxed
        for line in jsonl.read_lines(file, draws):
            for packer, graph in zip(packers, line.graphs, strict=True):
                packer.add(graph)
            if line.boxes is None:
                all_boxed = False
            elif all_boxed:
                boxes.append(line.boxes)
            yield line.image

    paths = PackedStrings.of(images())
    if not len(paths):
        raise ConfigError(f"{file}: holds no image")
    graphs = JoinedGraphs([PackedGraphs(packer.arrays(), table.names) for packer in packers])
    boxes_of = boxes.__getitem__ if all_boxed else None
    source = _files_source(folder, f"{folder} ({split})", paths, graphs, boxes_of, resolution, header["resize"], check)
    return dataclasses.replace(source, draws=draws)


def _files_source(
    folder: Path,
    name: str,
    relative: Sequence[str],
    graphs: Sequence[SceneGraph],
    boxes_of: Callable[[int], np.ndarray] | None,
    resolution: int,
    resize: str,
    check: bool,
) -> PairSource:
    """Images by path relative to FOLDER/images or FOLDER; `boxes_of` gives x, y, w, h in pixels. Pictures without
    boxes are turned upright (`open_rgb`)."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    missing = [path for path in relative if not (root / path).is_file()] if check else []
    if missing:
        raise ConfigError(
            f"--data {folder}: {len(missing)} of {len(relative)} images missing, first {root / missing[0]}; unpack the "
            "published image archives there, or train from `prepare cache`, which leaves out what is missing"
        )

    def boxes(index: int) -> np.ndarray:
        assert boxes_of is not None
        return boxes_in_square(boxes_of(index), size_of(root / relative[index]), resize)

    turned = set[int]()

    def load_image(index: int) -> np.ndarray:
        path = root / relative[index % len(relative)]
        image = open_rgb(path) if boxes_of else _upright(path, index % len(relative), turned)
        return to_square(image, resolution, resize)

    return PairSource(
        graphs,
        load_image,
        name,
        place=lambda i: root / relative[i % len(relative)],
        boxes=boxes if boxes_of else None,
        sizes=lambda i: original_and_crop(size_of(root / relative[i], upright=not boxes_of), resolution, resize),
        turned=turned,
    )


class _MirroredGraphs(OnRequest[SceneGraph]):
    """For each draw its `num` graphs, then the same mirrored."""

    def __init__(self, graphs: Sequence[SceneGraph], num: int) -> None:
        self._graphs, self._num = graphs, num

    def __len__(self) -> int:
        return 2 * len(self._graphs)

    def item(self, i: int) -> SceneGraph:
        draw, within = divmod(i, 2 * self._num)
        graph = self._graphs[draw * self._num + within % self._num]
        return graph if within < self._num else mirrored_graph(graph)


def with_mirrored(source: PairSource) -> PairSource:
    """All images, then all images mirrored, with "left" and "right" swapped in their graphs."""
    num = source.num_images
    graphs = _MirroredGraphs(source.graphs, num)

    def boxes(index: int) -> np.ndarray:
        assert source.boxes is not None
        found = source.boxes(index % num).copy()
        if index % (2 * num) >= num:
            found[:, [0, 2]] = 1 - found[:, [2, 0]]
        return found

    def load_image(index: int) -> np.ndarray:
        picture = source.load_image(index % num)
        return picture if index % (2 * num) < num else np.ascontiguousarray(picture[:, ::-1])

    place, sizes = source.place, source.sizes

    return dataclasses.replace(
        source,
        graphs=graphs,
        load_image=load_image,
        name=f"{source.name} and mirrored",
        place=None if place is None else lambda i: place(i % num),
        boxes=boxes if source.boxes else None,
        sizes=None if sizes is None else lambda i: sizes(i % num),
    )


def stored_source(folder: Path, data: DataConfig) -> PairSource:
    """A finished cache. Raises `ConfigError` if it is damaged, unfinished or has other settings than the run."""
    stored = StoredCache(folder)
    stored.check_settings(data)
    return PairSource(stored.graphs, stored.picture, str(folder), stored.draws, stored=stored)
