"""Settings of the training set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .fields import ConfigError, Part, setting

DRAWN_SETS = ("toy", "toy-rare", "toy-words", "toy-words-mixed", "toy-words-crowded", "toy-words-spread")
"""Values of --data that are not folders: toy scenes, generated on demand."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Part):
    """Source of the pairs of image and scene graph, and their form in training."""

    source: str = setting("toy", flag="data", makes_cache=True)
    """Training set: "toy", "toy-rare", "toy-words", "toy-words-mixed", "toy-words-crowded" or "toy-words-spread" (toy
    scenes, generated on demand), a folder that `sgg_fast.data.prepare` made (a set, or a cache of one), or a folder of
    images, each with its graph in a .json beside it. In a third of toy-rare's scenes a person holds something, or one
    thing is above another that is below it in other scenes; toy-words uses everyday relation words; in a third of
    toy-words-mixed's scenes things are in company that is new to toy-words; toy-words-crowded is the same, but every
    second scene has six things or more; toy-words-spread is that, but in every fourth scene four single things stand
    side by side."""
    num_published: int = setting(0, of_recipe=True)
    """Training images of the published set that the recipe is for; --plan uses it if --data is not given."""
    attributes: str = setting("none", choices=("none", "first"), in_cache=True, makes_cache=True)
    """Names of the objects of a Visual Genome set (train.h5): the name alone, or the first attribute and the name."""
    flip: str = setting("none", choices=("none", "swap"), in_cache=True, makes_cache=True)
    """Mirrored images: none, or a mirrored copy of each image with "left" and "right" swapped in its graph (swap)."""
    relation_draws: int = setting(1, at_least=1, in_cache=True, makes_cache=True)
    """Graphs of each image of a COCO set; their relations are drawn from its boxes. Each is a sample of its own."""
    resolution: int = setting(64, at_least=32, multiple_of=8, in_cache=True, makes_cache=True, in_card=True)
    """Resolution of the training images: width and height in pixels, a multiple of 8."""
    latents_device: str = setting(
        "auto", choices=("auto", "cpu"), may_change=True, exact=(), saves_memory={"latents_device": "cpu"}
    )
    """Where fine-tuning keeps the set's latents: on the GPU if they take less than a quarter of its free memory, else
    in files (auto); or in files or CPU memory (cpu). Those are read ahead, and losses are the same."""
    num_scenes: int = setting(256, at_least=1, makes_cache=True)
    """Number of toy scenes, where --data names one of their sets."""

    @property
    def is_drawn(self) -> bool:
        """Whether the set is generated on demand."""
        return self.source in DRAWN_SETS

    @property
    def num_expected(self) -> int:
        """Number of training images, as far as the settings determine it without opening the set."""
        return self.num_scenes if self.is_drawn else self.num_published

    def check_given(self) -> None:
        """Raises `ConfigError` if no setting names a training set, or if it does not exist."""
        if not self.source:
            raise ConfigError(
                "this recipe needs --data: a folder that `python -m sgg_fast.data.prepare` wrote, or one of images "
                "with a graph .json beside each"
            )
        if not (self.is_drawn or Path(self.source).is_dir()):
            raise ConfigError(f"--data {self.source}: there is no such folder, and it is not {' or '.join(DRAWN_SETS)}")
