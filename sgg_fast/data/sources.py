"""Where training pairs come from: (image, scene graph), image as uint8 [H, W, 3] at the asked resolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sgg_fast.config import Config, ConfigError
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.vg_h5 import read_split, read_vocabulary
from sgg_fast.graph import SceneGraph, SceneGraphError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Graphs at hand, images on request."""

    graphs: list[SceneGraph]
    load_image: Callable[[int], np.ndarray]
    """Index -> uint8 [H, W, 3]."""
    name: str

    def __len__(self) -> int:
        return len(self.graphs)


def open_source(config: Config) -> PairSource:
    """The training set that --data names. Raises `ConfigError` for one that cannot be used."""
    if config.data == "toy":
        return toy_source(config.seed, config.num_scenes, config.resolution)
    if not config.data:
        raise ConfigError(
            f"--recipe {config.recipe} needs --data: a folder of images with a graph .json beside each, or one that "
            "`python -m sgg_fast.data.prepare` wrote"
        )
    folder = Path(config.data)
    if (folder / "train.h5").is_file():
        return vg_source(folder, config.resolution)
    return folder_source(folder, config.resolution)


def toy_source(seed: int, num_scenes: int, resolution: int) -> PairSource:
    """The first `num_scenes` toy scenes of `seed`."""
    from sgg_fast.toy.world import draw_scene

    scenes = [draw_scene(seed, i, resolution) for i in range(num_scenes)]
    return PairSource([s.graph for s in scenes], lambda i: scenes[i].image, f"toy({num_scenes} scenes, seed {seed})")


def folder_source(folder: Path, resolution: int) -> PairSource:
    """Images of `folder` with sg2im JSON of the same stem beside them; centre-cropped squares, antialiased."""
    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: there is no such folder")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    paths = [p for p in images if p.with_suffix(".json").is_file()]
    if not paths:
        raise ConfigError(f"--data {folder}: no image with a graph beside it (scene.png and scene.json)")
    graphs = []
    for path in paths:
        found = load_scene_graphs(path.with_suffix(".json"))
        if len(found) != 1:
            raise SceneGraphError(f"{path.with_suffix('.json')}: must hold one graph, that of {path.name}")
        graphs += found

    def load_image(index: int) -> np.ndarray:
        rgb = open_rgb(paths[index])
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((resolution, resolution), Image.Resampling.LANCZOS))

    return PairSource(graphs, load_image, str(folder))


def vg_source(folder: Path, resolution: int, split: str = "train", first_attribute: bool = False) -> PairSource:
    """SPLIT.h5 and vocab.json of `folder` in sg2im's layout, images below FOLDER/images or else FOLDER itself.

    As in sg2im the whole picture is resized to the square, bilinear and antialiased: proportions change, but no
    object of the graph is cut off. Unlike sg2im, which draws ten objects at each access, every object and relation
    is taken. Raises `ConfigError` for files that cannot be used and for images that are missing.
    """
    graphs, relative = read_split(folder / f"{split}.h5", read_vocabulary(folder / "vocab.json"), first_attribute)
    root = folder / "images" if (folder / "images").is_dir() else folder
    missing = [path for path in relative if not (root / path).is_file()]
    if missing:
        raise ConfigError(
            f"--data {folder}: {len(missing)} of {len(relative)} images missing, first {root / missing[0]}; "
            "unpack Visual Genome's images.zip and images2.zip there"
        )

    def load_image(index: int) -> np.ndarray:
        square = open_rgb(root / relative[index]).resize((resolution, resolution), Image.Resampling.BILINEAR)
        return np.asarray(square)

    return PairSource(graphs, load_image, f"{folder} ({split})")


def open_rgb(path: Path) -> Image.Image:
    """A picture, decoded. Raises `ConfigError` naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of them
        raise ConfigError(f"{path}: cannot be read as an image: {error}") from error
