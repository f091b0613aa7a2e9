"""The models that training starts from: Stable Diffusion's parts and the CLIP that reads names and images.

Loads diffusers folders and hub ids, safetensors only. The toy's own parts are made in `sgg_fast/toy/models.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

_SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

# Kind of part -> the files it is known by, any of several sets. (A tokenizer without files loads all the same: empty.)
_KNOWN_BY = {
    "model": (("config.json",),),
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "scheduler": (("scheduler_config.json",),),
}


@dataclasses.dataclass
class Foundation:
    """Stable Diffusion in parts, and CLIP with both towers."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    clip: CLIPModel
    clip_tokenizer: CLIPTokenizer
    source: str
    """Folder, hub id or description that the parts came from."""

    def freeze(self) -> Foundation:
        """Everything in eval mode and without gradients; training turns the UNet on again."""
        for module in (self.unet, self.vae, self.text_encoder, self.clip):
            module.requires_grad_(False).eval()
        return self


def load_foundation(model: str, clip: str) -> Foundation:
    """`model`: SD v1 folder or hub id in diffusers format; `clip`: CLIP folder or hub id.

    `clip` may be empty where `model` is a pipeline of ours, which carries it. Raises ValueError that names
    the missing part. Weights stored in half precision are brought to fp32.
    """
    folder, full = Path(model), torch.float32  # transformers, unlike diffusers, would keep the stored type
    _check_place("--model", model)
    if clip:
        _check_place("--clip", clip)
    if folder.is_dir() and (lacking := missing_file(folder, _SD_PARTS)):
        raise ValueError(f"--model {model}: the folder lacks {lacking}; it must be in diffusers format")
    clip_at, clip_sub, tokenizer_sub = clip, "", ""
    if not clip:
        if missing_file(folder, ("graph_clip", "graph_tokenizer")):
            raise ValueError(f"--model {model} has no CLIP for names and images: give --clip (CLIP ViT-B/32)")
        clip_at, clip_sub, tokenizer_sub = model, "graph_clip", "graph_tokenizer"
    elif Path(clip).is_dir() and (lacking := _missing(Path(clip), "model") or _missing(Path(clip), "tokenizer")):
        raise ValueError(f"--clip {clip}: the folder lacks {lacking}")
    try:
        return Foundation(
            unet=UNet2DConditionModel.from_pretrained(model, subfolder="unet", use_safetensors=True),
            vae=AutoencoderKL.from_pretrained(model, subfolder="vae", use_safetensors=True),
            text_encoder=CLIPTextModel.from_pretrained(
                model, subfolder="text_encoder", use_safetensors=True, dtype=full
            ),
            tokenizer=CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
            scheduler=DDIMScheduler.from_pretrained(model, subfolder="scheduler", clip_sample=False),
            clip=CLIPModel.from_pretrained(clip_at, subfolder=clip_sub, use_safetensors=True, dtype=full),
            clip_tokenizer=CLIPTokenizer.from_pretrained(clip_at, subfolder=tokenizer_sub),
            source=model,
        ).freeze()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--model {model}{f' --clip {clip}' if clip else ''}: cannot be loaded: {reason}") from error


def missing_file(folder: Path, parts: Iterable[str]) -> str | None:
    """PART/FILE that a diffusers folder lacks of `parts`, or None. The last word of a part's name is its kind."""
    for part in parts:
        kind = part.rpartition("_")[2]
        if file := _missing(folder / part, kind if kind in _KNOWN_BY else "model"):
            return f"{part}/{file}"
    return None


def _missing(folder: Path, kind: str) -> str | None:
    there = (all((folder / file).is_file() for file in files) for files in _KNOWN_BY[kind])
    return None if any(there) else _KNOWN_BY[kind][0][0]


def _check_place(flag: str, place: str) -> None:
    if not Path(place).is_dir() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
        raise ValueError(f"{flag} {place}: there is no such folder, and it is not a hub id (owner/name)")
