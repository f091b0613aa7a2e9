"""Outputs of the frozen CLIP towers: name embeddings, image embeddings, SD's text states.

Letters: V strings, B images, I CLIP's projection width, L text length, C width of SD's text states,
K width of SDXL's pooled text state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerBase

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


@dataclasses.dataclass(frozen=True)
class TextTowers:
    """Stable Diffusion's frozen text side: one tower, or SDXL's two, each with its tokenizer.

    A row is the text state of one token, and for SDXL the pooled state of its whole text behind it, [.., C + K].

    * v1 and v2: the last layer after the final norm. v2's folders have one layer less than OpenCLIP, so that this is
      its penultimate layer.
    * SDXL: the layers before the last of both towers, without final norm, side by side; the pooled state is the second
      tower's end-of-text state (last layer, final norm), projected. Source: Podell et al., 2023, section 2.1.
    """

    encoders: tuple[Any, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]

    def to(self, device: torch.device) -> TextTowers:
        """The same towers, moved to `device`."""
        for encoder in self.encoders:
            encoder.to(device)
        return self

    def token_ids(self, strings: Sequence[str]) -> torch.Tensor:
        """[V, towers, L] int64 ids, which differ in their padding."""
        device = self.encoders[0].device
        return torch.stack([token_ids(tokenizer, strings, device) for tokenizer in self.tokenizers], dim=1)

    @torch.no_grad()
    def rows(self, ids_VnL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [V, L, C + K] of the texts with these ids, and those of their end-of-text tokens [V, C + K], fp32."""
        text_V, every, last = torch.arange(len(ids_VnL), device=ids_VnL.device), [], []
        for encoder, tokenizer, ids_VL in zip(self.encoders, self.tokenizers, ids_VnL.unbind(1), strict=True):
            end_V = (ids_VL == tokenizer.eos_token_id).int().argmax(dim=1)
            out = encoder(ids_VL, output_hidden_states=len(self.encoders) > 1)
            states_VLC = (out.last_hidden_state if len(self.encoders) == 1 else out.hidden_states[-2]).float()
            every.append(states_VLC)
            last.append(states_VLC[text_V, end_V])
        if len(self.encoders) > 1:
            pooled_VK = encoder.text_projection(out.last_hidden_state[text_V, end_V]).float()
            every.append(pooled_VK[:, None].expand(-1, ids_VnL.shape[2], -1))
            last.append(pooled_VK)
        return (every[0], last[0]) if len(every) == 1 else (torch.cat(every, dim=-1), torch.cat(last, dim=-1))

    def read(self, strings: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows` of `strings`."""
        return self.rows(self.token_ids(strings))

    def phrases(self, strings: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Row of each string's end-of-text token, [P, C + K], fp16; `--token-init text` starts a triple's token there.

        An offloaded encoder answers on another device than the one it lies on.
        """
        starts = range(0, len(strings), batch_size)
        parts = [self.read(strings[start : start + batch_size])[1].half() for start in starts]
        if not parts:
            width = sum(encoder.config.hidden_size for encoder in self.encoders)
            width += self.encoders[-1].config.projection_dim if len(self.encoders) > 1 else 0
            return torch.empty(0, width, dtype=torch.float16, device=self.encoders[0].device)
        return torch.cat(parts)


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
