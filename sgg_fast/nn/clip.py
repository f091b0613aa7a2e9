"""Outputs of the frozen CLIP towers: name embeddings, image embeddings, SD's text states.

Letters: V strings, B images, I CLIP's projection width, L text length, C width of SD's text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextModel, PreTrainedTokenizerBase

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def token_ids(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], device: torch.device) -> torch.Tensor:
    """[V, L] int64 ids of `strings`, padded and cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    tokens = tokenizer(list(strings), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


@torch.no_grad()
def embed_names(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Projected text embeddings [V, I] of `strings`, fp32, neither centred nor normalised."""
    parts = []
    for start in range(0, len(strings), batch_size):
        ids = token_ids(tokenizer, strings[start : start + batch_size], clip.device)
        parts.append(clip.get_text_features(ids).pooler_output.float())
    return torch.cat(parts)


@torch.no_grad()
def text_states(
    text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """SD's text states [V, L, C] of `strings` (last layer, final norm) and the index [V] of their end-of-text token."""
    ids = token_ids(tokenizer, strings, text_encoder.device)
    end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    return text_encoder(ids).last_hidden_state.float(), end


def phrase_states(
    text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """SD's end-of-text state of each string, [P, C], fp16; `--token-init text` adds it to a triple's token."""
    parts = []
    for start in range(0, len(strings), batch_size):
        states, end = text_states(text_encoder, tokenizer, strings[start : start + batch_size])
        parts.append(states[torch.arange(len(states)), end].half())
    if not parts:
        return torch.empty(0, text_encoder.config.hidden_size, dtype=torch.float16, device=text_encoder.device)
    return torch.cat(parts)  # an offloaded encoder answers on another device than the one it lies on


def normalise_pixels(clip: CLIPModel, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """Input of the image tower from pixels [B, 3, H, W] in -1..1; differentiable.

    Pixels are resized to the tower's resolution (bicubic, antialiased) and normalised as in CLIP's training.
    """
    size = clip.config.vision_config.image_size
    pixels = pixels_B3HW.float()
    if pixels.shape[-2:] != (size, size):
        pixels = nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    # Python numbers become kernel arguments; a constant tensor would be a copy that waits for the device.
    channels = ((pixels.clamp(-1, 1) + 1) / 2).unbind(1)
    return torch.stack([(c - m) / s for c, m, s in zip(channels, CLIP_MEAN, CLIP_STD, strict=True)], dim=1)


def embed_images(clip: CLIPModel, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """Projected image embeddings [B, I] of pixels [B, 3, H, W] in -1..1; differentiable in the pixels."""
    return clip.get_image_features(normalise_pixels(clip, pixels_B3HW).to(clip.dtype)).pooler_output.float()
