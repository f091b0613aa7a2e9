"""Reads a finished cache for training: checked at opening, then memory-mapped, so its size does not cost memory.

Letters: M images, S samples (S = D M for D draws of relations), I CLIP width, V names, P phrases, C + K width of
a text row (`nn.clip.TextTowers`), R side in pixels, c and h, w channels and sides of a latent. Files:

    index.json               settings, sizes and the SHA-256 of every other file
    shard-00000.safetensors  of its images: images [m, I], moments [m, 2c, h, w], item [m] index in the source,
                             stat [m, 2] bytes and modification time of each image's file (zeros for toy images)
    graphs.safetensors       the packed graphs of all samples, sizes [S, 2], names [V, I], phrases [P, C + K] if made,
                             boxes [N, 4] of all objects if the set has them, previews [k, R, R, 3] of the first images;
                             picture_sizes [M, 4], `PairSource.size_rows` of the images, which older caches lack;
                             text and text_ends of the names; phrase_rows [P, 3], the names of each phrase
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sgg_fast.config import SETTINGS, ConfigError, DataConfig, flag
from sgg_fast.data.packed import PackedGraphs, PackedStrings
from sgg_fast.data.shards import INDEX, DamagedError, check_files, read_index, read_tensors
from sgg_fast.graph import IMAGE_OBJECT, NameTable, SceneGraphBatch

if TYPE_CHECKING:
    import torch

    from sgg_fast.data.moments import MomentRows

FORMAT = "sgg_fast cache 2"
JOB = "job.json"
GRAPHS = "graphs.safetensors"
GRAPH_TENSORS = (
    "object_name", "predicate_name", "phrase", "subject", "object", "object_ptr", "relation_ptr", "message_ptr",
    "message_mid", "message_slot", "object_graph", "relation_graph", "object_pooled", "relation_pooled",
)  # fmt: skip


def fixed_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that determine a cache, by flat name; a run must have equal values."""
    return {name: getattr(data, s.field) for name, s in SETTINGS.items() if s.rules.in_cache}


def is_cache(folder: Path) -> bool:
    """True if `folder` is a cache, finished or not."""
    return (folder / INDEX).is_file() or (folder / JOB).is_file()


class StoredCache:
    """A finished cache. Raises `ConfigError` naming the file if it is damaged or unfinished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / INDEX).is_file():
            raise ConfigError(f"{folder}: this cache is not finished; run the same `prepare cache` command to go on")
        self.index = read_index(folder)
        if self.index.get("format") != FORMAT:
            raise ConfigError(f"{folder / INDEX}: not of the format {FORMAT!r}; prepare the cache again")
        try:
            self._open()
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            # The digests match, but the content is not a cache: both were written by other means.
            raise DamagedError(
                folder / INDEX, f"does not describe a cache ({type(error).__name__}: {error})"
            ) from error

    def _open(self) -> None:
        folder, entries = self.folder, self.index["shards"]
        check_files(folder, [*entries, self.index["graphs"]])
        self._shards = [read_tensors(folder / Path(entry["file"]).name)[0] for entry in entries]
        self.arrays, _ = read_tensors(folder / GRAPHS)
        self.names = PackedStrings(self.arrays.pop("text"), self.arrays.pop("text_ends"))
        self.phrase_rows = self.arrays.pop("phrase_rows")
        self.draws: int = self.index["draws"]
        self.graphs = PackedGraphs(self.arrays, self.names)
        if len(self.graphs) != self.draws * self.num_images or self.names[0] != IMAGE_OBJECT:
            raise DamagedError(folder / GRAPHS, "does not fit the shards")
        for name, most in (("object_name", self.names), ("predicate_name", self.names), ("phrase", self.phrase_rows)):
            if not 0 <= self.arrays[name].min() <= self.arrays[name].max() < len(most):
                raise DamagedError(folder / GRAPHS, f"{name} points outside the words")
        if not -1 <= self.phrase_rows.min() <= self.phrase_rows.max() < len(self.names):
            raise DamagedError(folder / GRAPHS, "phrase_rows points outside the words")
        known = {"settings": fixed_settings(DataConfig()), "models": ("clip", "vae", "text_encoder")}
        if lacking := [key for part, keys in known.items() for key in keys if key not in self.index[part]]:
            raise KeyError(*lacking)
        if not all(isinstance(self.index[key], str) for key in ("data", "split")):
            raise TypeError("data and split must be text")
        if self.arrays["previews"].ndim != 4 or any(shard["moments"].ndim != 4 for shard in self._shards):
            raise ValueError("previews and moments must have four dimensions")
        if self.arrays.get("picture_sizes", np.empty((self.num_images, 4))).shape != (self.num_images, 4):
            raise ValueError("picture_sizes must have four numbers an image")

    @property
    def num_images(self) -> int:
        """M."""
        return sum(len(shard["images"]) for shard in self._shards)

    def check_settings(self, data: DataConfig) -> None:
        """Raises `ConfigError` if the run's settings need other pictures or graphs than the cache has."""
        for name, now in fixed_settings(data).items():
            was = self.index["settings"][name]
            if was != now:
                raise ConfigError(
                    f"--data {self.folder}: this cache was prepared with --{flag(name)} {was}, not {now}; "
                    "give that flag or prepare another cache"
                )

    def check_pictures(self, num: int) -> None:
        """Raises `ConfigError` if the cache keeps fewer than `num` images as pictures."""
        kept, num = len(self.arrays["previews"]), min(num, self.num_images)
        if num > kept:
            raise ConfigError(f"--num-samples {num}: a cache keeps {kept} pictures; ask for fewer")

    def picture(self, index: int) -> np.ndarray:
        """uint8 [R, R, 3] of an image. Raises `ConfigError` if only its latent was kept."""
        index %= self.num_images
        if index < len(self.arrays["previews"]):
            return np.asarray(self.arrays["previews"][index])
        raise ConfigError(f"{self.folder}: of image {index} only the latent is in the cache")

    def batch(self) -> SceneGraphBatch:
        """All graphs, packed, on the CPU."""
        import torch

        tensors = {name: torch.from_numpy(np.array(self.arrays[name])) for name in GRAPH_TENSORS}
        return SceneGraphBatch(**tensors, sizes=np.array(self.arrays["sizes"]))

    def table(self) -> NameTable:
        """Names and phrases with the ids of the graphs."""
        return NameTable(stored=self.names, phrase_rows=self.phrase_rows)

    def images(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[S, I] image embeddings on `device`, read shard by shard."""
        from sgg_fast.data.moments import read_to

        rows = read_to([shard["images"] for shard in self._shards], device)
        return rows if self.draws == 1 else rows.repeat(self.draws, 1)

    def moments(self) -> MomentRows:
        """[S, 2c, h, w]."""
        from sgg_fast.data.moments import MomentRows

        return MomentRows([shard["moments"] for shard in self._shards], self.draws)
