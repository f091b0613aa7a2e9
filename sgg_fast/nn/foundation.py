"""The models that training starts from: Stable Diffusion's parts and the CLIP that reads names and images.

Loads diffusers folders and hub ids, safetensors only. The toy's own parts are made in `sgg_fast/toy/models.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

_SD_PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
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
    the missing part.
    """
    folder = Path(model)
    if folder.is_dir():
        for part, file in _SD_PARTS.items():
            if not (folder / part / file).is_file():
                raise ValueError(f"--model {model}: the folder lacks {part}/{file}; it must be in diffusers format")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(f"--model {model}: there is no such folder, and it is not a hub id (owner/name)")
    clip_at, clip_sub, tokenizer_sub = clip, "", ""
    if not clip:
        if not (folder / "graph_clip" / "config.json").is_file():
            raise ValueError(f"--model {model} has no CLIP for names and images: give --clip (CLIP ViT-B/32)")
        clip_at, clip_sub, tokenizer_sub = model, "graph_clip", "graph_tokenizer"
    elif Path(clip).is_absolute() and not Path(clip).is_dir():
        raise ValueError(f"--clip {clip}: there is no such folder")
    try:
        return Foundation(
            unet=UNet2DConditionModel.from_pretrained(model, subfolder="unet", use_safetensors=True),
            vae=AutoencoderKL.from_pretrained(model, subfolder="vae", use_safetensors=True),
            text_encoder=CLIPTextModel.from_pretrained(model, subfolder="text_encoder", use_safetensors=True),
            tokenizer=CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
            scheduler=DDIMScheduler.from_pretrained(model, subfolder="scheduler", clip_sample=False),
            clip=CLIPModel.from_pretrained(clip_at, subfolder=clip_sub, use_safetensors=True),
            clip_tokenizer=CLIPTokenizer.from_pretrained(clip_at, subfolder=tokenizer_sub),
            source=model,
        ).freeze()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {model}{f' --clip {clip}' if clip else ''}: cannot be loaded: {reason}") from error
