"""Outputs of the frozen models, computed once: VAE moments, CLIP image embeddings, name embeddings, packed graphs.

Only this module and `prepare/cache.py`, which writes files, run models in `data/`. The results lie in the memory of the
training device; moments that need too much of it stay in files or host memory (`moments.py`). Letters: M images of the
set, S samples (S = D M for D draws of relations), I CLIP width, V names, c and h, w channels and sides of a latent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from sgg_fast.commands import NotFiniteError
from sgg_fast.config import ConfigError, ModelConfig
from sgg_fast.data.moments import MomentRows, read_to
from sgg_fast.data.sources import PairSource
from sgg_fast.data.stored import StoredCache
from sgg_fast.graph import NameTable, SceneGraphBatch
from sgg_fast.nn.clip import embed_images, embed_names
from sgg_fast.nn.foundation import Foundation, load_foundation

logger = logging.getLogger(__name__)

RESIDENT_SHARE = 0.25
"""Share of a GPU's free memory. Moments that need less are kept there and not sent with every step."""


_LARGEST = torch.finfo(torch.float16).max

ENCODED_PIXELS = 32 * 128**2
"""Pixels that the VAE encodes at once: about 1 GiB of activations at SD's widths, whatever the resolution."""


@dataclasses.dataclass
class TrainingCache:
    """The tensors of a training set for the training step."""

    graphs: SceneGraphBatch
    """All S graphs, packed."""
    table: NameTable
    names: torch.Tensor
    """[V, I] raw CLIP embeddings of the table's strings."""
    images: torch.Tensor
    """[S, I] raw CLIP image embeddings."""
    moments: torch.Tensor | MomentRows | None
    """fp16 [S, 2c, h, w] mean and log-variance of the VAE posterior; None for pre-training alone."""
    phrases: torch.Tensor | None = None
    """[P, C + K] SD's end-of-text row (`clip.TextTowers`) of each phrase of the table; None without text
    initialisation."""
    texts: torch.Tensor | None = None
    """[S, towers, L] token ids of each graph's text; None unless SD's text encoders read whole texts."""
    boxes: torch.Tensor | None = None
    """[N, 4] x0, y0, x1, y1 in picture units of every object of `graphs`; None if no loss needs boxes."""
    sizes: torch.Tensor | None = None
    """fp32 [S, 4] of `PairSource.size_rows`; None unless the UNet reads them (SDXL)."""

    def __len__(self) -> int:
        return self.graphs.num_graphs

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        assert self.moments is not None
        _, twice_c, height, width = self.moments.shape
        return twice_c // 2, height, width

    def to(self, device: torch.device) -> TrainingCache:
        """The same set on `device`; `MomentRows` stay where they are."""
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in held.items() if isinstance(value, torch.Tensor | SceneGraphBatch)
        }
        return dataclasses.replace(self, **moved)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in memory."""
        held = [*vars(self).values(), *vars(self.graphs).values()]
        return [value for value in held if isinstance(value, torch.Tensor)]

    def latents(self, index_B: torch.Tensor, noise_Bchw: torch.Tensor) -> torch.Tensor:
        """Unscaled samples of the posterior at `index`: mean + std * noise. `MomentRows` give the rows they brought."""
        rows_B = self.moments.current if isinstance(self.moments, MomentRows) else self.moments[index_B]  # type: ignore[index]
        assert rows_B is not None
        mean, logvar = rows_B.float().chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise_Bchw


def open_foundation(model: ModelConfig) -> Foundation:
    """The models of --model and --clip, or the toy's. Raises `ConfigError`."""
    model.check_given()
    if model.source:
        return load_foundation(model.source, model.clip)
    from sgg_fast.toy.models import toy_foundation

    return toy_foundation(wide=model.sizes == "toy-words")


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """fp32 [B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3]. Raises `NotFiniteError` for NaN and Inf, which bytes hide."""
    if not pixels.isfinite().all():
        raise NotFiniteError("a picture of the VAE has numbers that are not finite: get the model again")
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def encode_images(
    images: np.ndarray, foundation: Foundation, device: torch.device, with_latents: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 [B, H, W, 3] -> CLIP embeddings, fp32 [B, I], and, with latents, VAE moments, fp16 [B, 2c, h, w].

    Raises `NotFiniteError` for NaN or Inf: no set is worth training on with them. Values beyond fp16 are clamped.
    """
    pixels, moments = to_pixels(images, device), None
    embedded = embed_images(foundation.clip, pixels)
    if with_latents:
        moments = foundation.vae.encode(pixels.to(foundation.vae.dtype)).latent_dist.parameters.float()
        moments = moments.clamp(-_LARGEST, _LARGEST).half()
    for flag, part, found in (("clip", "the image tower", embedded), ("model", "the VAE", moments)):
        if found is not None and not found.isfinite().all():
            raise NotFiniteError(f"--{flag}: {part} gives numbers that are not finite: get the model again")
    return embedded, moments


@torch.no_grad()
def build_cache(
    source: PairSource,
    foundation: Foundation,
    device: torch.device,
    with_latents: bool,
    with_phrases: bool = False,
    with_boxes: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
    latents_device: str = "auto",
) -> TrainingCache:
    """Run the frozen models over the whole set. They are moved to `device` and stay there until `assemble`.

    batch_size: images encoded at once; None: as many as `ENCODED_PIXELS` allows. latents_device: as in `DataConfig`.

    A prepared cache is read instead. Raises `ConfigError` if other models made it, and if the run needs boxes and the
    set has none.
    """
    boxes = _boxes(source, device) if with_boxes else None
    sizes = _sizes(source, device) if with_latents and foundation.backbone.pooled_dim else None
    if source.stored is not None:
        found = _from_stored(source.stored, foundation, device, with_latents, with_phrases, latents_device)
        return dataclasses.replace(found, boxes=boxes, sizes=sizes)
    table = NameTable()
    graphs = SceneGraphBatch.from_graphs(source.graphs, table)
    clip = foundation.clip.to(device)
    if with_latents:
        foundation.vae.to(device)
    images, moments = [], []
    if batch_size is None:
        batch_size = max(1, ENCODED_PIXELS // source.load_image(0).shape[0] ** 2)
    starts = range(0, source.num_images, batch_size)
    for start in tqdm(starts, desc="encode images", unit="batch", disable=None if progress else True, leave=False):
        stop = min(start + batch_size, source.num_images)
        pictures = np.stack([source.load_image(i) for i in range(start, stop)])
        embedded, parameters = encode_images(pictures, foundation, device, with_latents)
        images.append(embedded)
        moments += [] if parameters is None else [parameters.to("cpu" if latents_device == "cpu" else device)]
    if source.turned:
        logger.warning("%s", source.said_turned)
    return TrainingCache(
        graphs=graphs.to(device),
        table=table,
        names=embed_names(clip, foundation.clip_tokenizer, table.spoken()),
        images=torch.cat(images).repeat(source.draws, 1),
        moments=_held(torch.cat(moments), source.draws, latents_device) if with_latents else None,
        phrases=_phrases(foundation, table, device) if with_phrases else None,
        boxes=boxes,
        sizes=sizes,
    )


def _held(moments: torch.Tensor, draws: int, latents_device: str) -> torch.Tensor | MomentRows:
    return MomentRows([moments.numpy()], draws) if latents_device == "cpu" else moments.repeat(draws, 1, 1, 1)


def _phrases(foundation: Foundation, table: NameTable, device: torch.device) -> torch.Tensor:
    return foundation.towers.to(device).phrases(table.phrases)


def _boxes(source: PairSource, device: torch.device) -> torch.Tensor:
    """[N, 4] of every object of the packed graphs. Raises `ConfigError`."""
    stored, cure = source.stored, "train with --geometry 0 --attention-loss 0, or from a set that has boxes"
    rows = source.box_rows(range(source.num_images)) if stored is None else stored.arrays.get("boxes")
    if rows is None:
        cure = cure if stored is None else "prepare the cache again (--overwrite) from a set that has boxes"
        raise ConfigError(f"--geometry and --attention-loss: {source.name} has no boxes; {cure}")
    return torch.from_numpy(np.array(rows)).to(device)


def _sizes(source: PairSource, device: torch.device) -> torch.Tensor:
    """[S, 4] of every sample."""
    rows = None if source.stored is None else source.stored.arrays.get("picture_sizes")
    if source.stored is not None and rows is None:
        logger.warning("%s lacks the sizes of its pictures, so SDXL takes each for its own original; the same `prepare "
                       "cache` command adds them", source.name)  # fmt: skip
    rows = source.size_rows(range(source.num_images)) if rows is None else rows
    return torch.from_numpy(np.array(rows)).to(device).repeat(source.draws, 1)


def text_fingerprint(foundation: Foundation) -> str:
    """SHA-256 of the text encoders' weights: of the only one, or of both one after the other."""
    first, *others = map(fingerprint, foundation.text_encoders)
    return hashlib.sha256(" ".join([first, *others]).encode()).hexdigest() if others else first


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a model's weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_stored(
    stored: StoredCache,
    foundation: Foundation,
    device: torch.device,
    with_latents: bool,
    with_phrases: bool,
    latents_device: str,
) -> TrainingCache:
    """The tensors of a prepared cache; missing phrases are computed."""
    used = {"clip": foundation.clip, "vae": foundation.vae if with_latents else None}
    for part, module in used.items():
        if module is not None and fingerprint(module) != stored.index["models"][part]:
            flag = "--clip" if part == "clip" else "--model"
            raise ConfigError(f"--data {stored.folder}: this cache was prepared with another {part}; give the same "
                              f"{flag} or prepare another cache")  # fmt: skip
    table, phrases = stored.table(), None
    if with_phrases and text_fingerprint(foundation) == stored.index["models"]["text_encoder"]:
        phrases = read_to([stored.arrays["phrases"]], device)
    elif with_phrases:
        phrases = _phrases(foundation, table, device)
    moments = stored.moments() if with_latents else None
    return TrainingCache(
        graphs=stored.batch().to(device),
        table=table,
        names=read_to([stored.arrays["names"]], device),
        images=stored.images(device),
        moments=moments.on(device) if moments and latents_device == "auto" and _fits(moments, device) else moments,
        phrases=phrases,
    )


def _fits(moments: MomentRows, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return moments.dtype.itemsize * int(np.prod(moments.shape)) < RESIDENT_SHARE * free
