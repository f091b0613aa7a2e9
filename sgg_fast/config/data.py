"""Settings of the training set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .fields import ConfigError, Part, setting

DRAWN_SETS = ("toy", "toy-rare", "toy-words")
"""Values of --data that are no folder: toy scenes, drawn on the spot."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Part):
    """Where pairs of image and scene graph come from, and in which form training sees them."""

    source: str = setting("toy", flag="data", makes_cache=True)
    """Training set: "toy", "toy-rare" or "toy-words" (drawn on the spot; in a third of toy-rare's scenes one thing is
    above another that is elsewhere below it, or somebody holds something; toy-words speaks as people type), a folder
    that `sgg_fast.data.prepare` made (a set, or a cache of one), or a folder of images, each with its graph in a .json
    beside it."""
    num_published: int = setting(0, of_recipe=True)
    """Training images of the published set that the recipe stands for, which --plan counts without --data."""
    attributes: str = setting("none", choices=("none", "first"), in_cache=True, makes_cache=True)
    """Objects of a Visual Genome set (train.h5): by name alone, or with the first of their attributes in front."""
    flip: str = setting("none", choices=("none", "swap"), in_cache=True, makes_cache=True)
    """Mirrored images: none, or each once more with "left" and "right" swapped in its graph (swap)."""
    relation_draws: int = setting(1, at_least=1, in_cache=True, makes_cache=True)
    """Graphs of each image of a COCO set, whose relations are drawn from its boxes; each is a sample of its own."""
    resolution: int = setting(64, at_least=32, multiple_of=8, in_cache=True, makes_cache=True, in_card=True)
    """Side of the training images, in pixels; a multiple of 8."""
    num_scenes: int = setting(256, at_least=1, makes_cache=True)
    """Number of toy scenes, with --data toy, toy-rare or toy-words."""

    @property
    def is_drawn(self) -> bool:
        """Whether the set is drawn on the spot."""
        return self.source in DRAWN_SETS

    @property
    def num_expected(self) -> int:
        """Training images, as far as the settings tell without opening the set."""
        return self.num_scenes if self.is_drawn else self.num_published

    def check_given(self) -> None:
        """Raises `ConfigError` where nothing says what to train on, or where it is not there."""
        if not self.source:
            raise ConfigError(
                "this recipe needs --data: a folder that `python -m sgg_fast.data.prepare` wrote, or one of images "
                "with a graph .json beside each"
            )
        if not (self.is_drawn or Path(self.source).is_dir()):
            raise ConfigError(f"--data {self.source}: there is no such folder, and it is not {' or '.join(DRAWN_SETS)}")
