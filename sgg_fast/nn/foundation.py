"""The base models of training: Stable Diffusion's parts and the CLIP for names and images.

Loads diffusers folders and hub ids, safetensors only. `sgg_fast/toy/models.py` makes the toy's parts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from sgg_fast.nn import loading
from sgg_fast.nn.loading import kinds

_SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_OWN_CLIP = ("graph_clip", "graph_tokenizer")


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
    """Folder, hub id or description of the parts' origin."""

    def freeze(self) -> Foundation:
        """Put all parts in eval mode without gradients; training enables the UNet again."""
        for module in (self.unet, self.vae, self.text_encoder, self.clip):
            module.requires_grad_(False).eval()
        return self

    def pipeline_parts(self) -> dict[str, Any]:
        """The parts by their names in a pipeline; the graph encoder is not among them."""
        parts = {name: getattr(self, name) for name in _SD_PARTS}
        return parts | dict(zip(_OWN_CLIP, (self.clip, self.clip_tokenizer), strict=True))


def load_foundation(model: str, clip: str) -> Foundation:
    """`model`: SD v1 folder or hub id in diffusers format; `clip`: CLIP folder or hub id.

    `clip` may be empty if `model` is an exported pipeline, which contains CLIP. Weights in half precision are cast to
    fp32. Raises `ModelError`, a ValueError of one line that names folder, file and cause.
    """
    for flag, place in (("--model", model), ("--clip", clip)):
        if place:
            loading.check_place(flag, place)  # before any download
    root = loading.find_folder("--model", model, (*_SD_PARTS, *(() if clip else _OWN_CLIP)))
    if lacking := loading.lacking_file(root, _SD_PARTS):
        raise loading.ModelError(f"--model {model}: the folder lacks {lacking}; it must be in diffusers format")
    if not clip and loading.lacking_file(root, _OWN_CLIP):
        raise loading.ModelError(f"--model {model} has no CLIP for names and images: give --clip (CLIP ViT-B/32)")
    at = loading.find_folder("--clip", clip, ("",)) if clip else root
    if clip and (lacking := loading.lacking(at, "model") or loading.lacking(at, "tokenizer")):
        raise loading.ModelError(f"--clip {clip}: the folder lacks {lacking}")
    with loading.border(f"--model {model}: cannot be loaded"):
        loading.check(root, (*_SD_PARTS, *(() if clip else _OWN_CLIP)))
        parts = load_sd_parts(root)
        parts["scheduler"] = loading.load_scheduler(root, "scheduler", as_ddim=True)
        if not clip:
            parts |= load_clip(root, *_OWN_CLIP)
    if clip:
        with loading.border(f"--clip {clip}: cannot be loaded"):
            loading.check(at, ("",))
            parts |= load_clip(at, "", "")
    return Foundation(**parts, source=model).freeze()


def load_sd_configs(root: Path, with_text: bool = True) -> tuple[dict, dict, dict | None]:
    """Configurations of UNet, VAE and (`with_text`) text encoder, checked to be SD v1's kind and to fit together.

    Raises `ModelError`.
    """
    config = loading.load_config
    unet = config(root, "unet", kinds.check_unet, "_class_name", "UNet2DConditionModel")
    vae = config(root, "vae", kinds.check_vae, "_class_name", "AutoencoderKL")
    text = config(root, "text_encoder", kinds.check_text_tower, "model_type", "clip_text_model") if with_text else None
    kinds.check_fit(unet, vae, text)
    return unet, vae, text


def load_sd_parts(root: Path, with_text: bool = True) -> dict[str, Any]:
    """UNet, VAE and (`with_text`) text encoder and tokenizer of a diffusers folder, by field name of `Foundation`.

    Raises `ModelError`.
    """
    unet, vae, text = load_sd_configs(root, with_text)
    parts = {
        "unet": loading.load_part(root, "unet", UNet2DConditionModel, unet),
        "vae": loading.load_part(root, "vae", AutoencoderKL, vae),
    }
    if text is not None:
        parts["text_encoder"] = loading.load_part(root, "text_encoder", CLIPTextModel, text)
        parts["tokenizer"] = loading.load_tokenizer(root, "tokenizer", parts["text_encoder"].config)
    return parts


def load_clip(root: Path, clip: str, tokenizer: str) -> dict[str, Any]:
    """CLIP with both towers and its tokenizer, from the parts `clip` and `tokenizer`. Raises `ModelError`."""
    config = loading.load_config(root, clip, lambda _: None, "model_type", "clip")
    model = loading.load_part(root, clip, CLIPModel, config)
    return {"clip": model, "clip_tokenizer": loading.load_tokenizer(root, tokenizer, model.config.text_config)}
