"""The base models of training: Stable Diffusion's parts and the CLIP for names and images.

Loads diffusers folders and hub ids, safetensors only: Stable Diffusion v1 and v2, or SDXL base with its second text
encoder (`backbone.Backbone` says which). `sgg_fast/toy/models.py` makes the toy's parts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sgg_fast.graph import shown
from sgg_fast.nn import loading
from sgg_fast.nn.backbone import Backbone
from sgg_fast.nn.clip import TextTowers
from sgg_fast.nn.loading import kinds

_SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_FIRST, _SECOND = ("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")
_OWN_CLIP = ("graph_clip", "graph_tokenizer")
_INDEX, _ZEROS = "model_index.json", "force_zeros_for_empty_prompt"


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
    text_encoder_2: CLIPTextModelWithProjection | None = None
    """SDXL's; None for v1 and v2."""
    tokenizer_2: CLIPTokenizer | None = None
    empty_is_zero: bool = False
    """Whether the empty text's states are zeros (force_zeros_for_empty_prompt of SDXL's model_index.json)."""

    @property
    def backbone(self) -> Backbone:
        """What the UNet reads."""
        return Backbone.of(self.unet.config)

    @property
    def latent_factor(self) -> int:
        """Width in pixels of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """One, or SDXL's two."""
        return tuple(encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None)

    @property
    def towers(self) -> TextTowers:
        """The text encoders with their tokenizers."""
        tokenizers = (self.tokenizer, self.tokenizer_2)
        return TextTowers(self.text_encoders, tuple(words for words in tokenizers if words is not None))

    def freeze(self) -> Foundation:
        """Put all parts in eval mode without gradients; training enables the UNet again."""
        for module in (self.unet, self.vae, *self.text_encoders, self.clip):
            module.requires_grad_(False).eval()
        return self

    def pipeline_parts(self) -> dict[str, Any]:
        """The parts by their names in a pipeline; the graph encoder is not among them."""
        names = (*_SD_PARTS, *(_SECOND if self.text_encoder_2 is not None else ()))
        parts = {name: getattr(self, name) for name in names}
        return parts | dict(zip(_OWN_CLIP, (self.clip, self.clip_tokenizer), strict=True))


def load_foundation(model: str, clip: str) -> Foundation:
    """`model`: folder or hub id of Stable Diffusion v1, v2 or SDXL in diffusers format; `clip`: CLIP folder or hub id.

    `clip` may be empty if `model` is an exported pipeline, which contains CLIP. Weights in half precision are cast to
    fp32. Raises `ModelError`, a ValueError of one line that names folder, file and cause.
    """
    for flag, place in (("--model", model), ("--clip", clip)):
        if place:
            loading.check_place(flag, place)  # before any download
    root = loading.find_folder("--model", model, (*_SD_PARTS, *_SECOND, *(() if clip else _OWN_CLIP)))
    if lacking := loading.lacking_file(root, _SD_PARTS):
        raise loading.ModelError(f"--model {model}: the folder lacks {lacking}; it must be in diffusers format")
    if not clip and loading.lacking_file(root, _OWN_CLIP):
        raise loading.ModelError(f"--model {model} has no CLIP for names and images: give --clip (CLIP ViT-B/32)")
    at = loading.find_folder("--clip", clip, ("",)) if clip else root
    if clip and (lacking := loading.lacking(at, "model") or loading.lacking(at, "tokenizer")):
        raise loading.ModelError(f"--clip {clip}: the folder lacks {lacking}")
    with loading.border(f"--model {model}: cannot be loaded"):
        loading.check(root, (*_SD_PARTS, *_SECOND, *(() if clip else _OWN_CLIP)))
        parts = load_sd_parts(root)
        parts["empty_is_zero"] = "text_encoder_2" in parts and _forces_zeros(root)
        parts["scheduler"] = loading.load_scheduler(root, "scheduler", as_ddim=True)
        if not clip:
            parts |= load_clip(root, *_OWN_CLIP)
    if clip:
        with loading.border(f"--clip {clip}: cannot be loaded"):
            loading.check(at, ("",))
            parts |= load_clip(at, "", "")
    return Foundation(**parts, source=model).freeze()


def _forces_zeros(root: Path) -> bool:
    """force_zeros_for_empty_prompt of a folder's model_index.json; without an entry True, as in diffusers."""
    index = loading.read_json(root / _INDEX, _INDEX) if (root / _INDEX).is_file() else {}
    with loading.border(_INDEX):
        zeros = index.get(_ZEROS, True)
        if not isinstance(zeros, bool):
            raise loading.ModelError(f"{_ZEROS} must be true or false, not {shown(zeros)}")
    return zeros


def load_sd_configs(root: Path, with_text: bool = True) -> tuple[dict, dict, list[dict]]:
    """Configurations of UNet, VAE and (`with_text`) text encoders, checked to be of SD's kinds and to fit together.

    Raises `ModelError`.
    """
    config = loading.load_config
    unet = config(root, "unet", kinds.check_unet, "_class_name", "UNet2DConditionModel")
    vae = config(root, "vae", kinds.check_vae, "_class_name", "AutoencoderKL")
    towers = ("text_encoder", "text_encoder_2")[: Backbone.of(unet).num_towers if with_text else 0]
    if lacking := loading.lacking_file(root, towers):
        raise loading.ModelError(f"the folder lacks {lacking}")
    texts = [config(root, tower, kinds.check_text_tower, "model_type", "clip_text_model") for tower in towers]
    kinds.check_fit(unet, vae, texts)
    return unet, vae, texts


def load_sd_parts(root: Path, with_text: bool = True) -> dict[str, Any]:
    """UNet, VAE and (`with_text`) text encoders and tokenizers of a diffusers folder, by field name of `Foundation`.

    Raises `ModelError`.
    """
    unet, vae, texts = load_sd_configs(root, with_text)
    parts = {
        "unet": loading.load_part(root, "unet", UNet2DConditionModel, unet),
        "vae": loading.load_part(root, "vae", AutoencoderKL, vae),
    }
    kinds_of = (CLIPTextModel, CLIPTextModelWithProjection)
    for text, kind, encoder, tokenizer in zip(texts, kinds_of, *zip(_FIRST, _SECOND, strict=True), strict=False):
        parts[encoder] = loading.load_part(root, encoder, kind, text)
        parts[tokenizer] = loading.load_tokenizer(root, tokenizer, parts[encoder].config)
    return parts


def load_clip(root: Path, clip: str, tokenizer: str) -> dict[str, Any]:
    """CLIP with both towers and its tokenizer, from the parts `clip` and `tokenizer`. Raises `ModelError`."""
    config = loading.load_config(root, clip, lambda _: None, "model_type", "clip")
    model = loading.load_part(root, clip, CLIPModel, config)
    return {"clip": model, "clip_tokenizer": loading.load_tokenizer(root, tokenizer, model.config.text_config)}
