"""The settings of `prepare cache`, checked without torch, so that refusals do not wait for the libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sgg_fast.config import ConfigError, DataConfig, ModelConfig, flag
from sgg_fast.data.sources import PairSource, open_source
from sgg_fast.data.stored import is_cache


@dataclasses.dataclass(frozen=True)
class CacheJob:
    """One cache to make."""

    model: ModelConfig
    data: DataConfig
    seed: int
    """Seed of toy scenes."""
    out: Path
    split: str = "train"
    shard_size: int = 1024
    """Images a file."""
    batch_size: int = 32
    """Images that the frozen models read at once; the bytes depend on it."""
    workers: int = 1
    """Processes; more than one are spread over the GPUs."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{flag(name)} must be at least 1, not {getattr(self, name)}")
        self.data.check_given()
        self.model.check_given()
        if not self.data.is_drawn and is_cache(Path(self.data.source)):
            raise ConfigError(f"--data {self.data.source}: is a cache already")

    def open_source(self) -> PairSource:
        """The set; absent images are left out later."""
        return open_source(self.data, self.seed, self.split, check=False)
