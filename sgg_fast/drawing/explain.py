"""Cross-attention maps of each object and relation of a graph, recorded during sampling.

The maps are computed beside the model's own attention and do not change its output: the picture is bit-identical.
Letters: B pictures, T context tokens, H heads, P places of a layer's feature map, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from sgg_fast.data.text_form import object_labels
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.lora import whole_weight
from sgg_fast.pictures.sheets import tiles, zoomed

_RAMP = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=float)
"""Dark to bright, in equal steps."""


class AttentionMaps:
    """While entered, records the cross-attention of a UNet: mean over heads, layers and steps.

    size: (h, w) of the latents; every layer's map is enlarged to it. num_images: B; if the UNet is called with 2B or 3B
    (guidance), the last B, those of the condition, are recorded.
    """

    def __init__(self, unet: UNet2DConditionModel, num_images: int, size: tuple[int, int]) -> None:
        self.unet, self.num_images, self.size = unet, num_images, size
        self.sums: dict[int, torch.Tensor] = {}
        """P -> sum over the layers of that many places and the steps, [B, P, T]."""
        self.count = 0

    def __enter__(self) -> AttentionMaps:
        self.before = self.unet.attn_processors
        recording = {
            name: _Recorder(processor, self) if ".attn2." in name else processor
            for name, processor in self.before.items()
        }
        self.unet.set_attn_processor(recording)
        return self

    def __exit__(self, *_: object) -> None:
        self.unet.set_attn_processor(self.before)

    def add(self, probabilities_BPT: torch.Tensor) -> None:
        """Add one layer at one step."""
        places = probabilities_BPT.shape[1]
        if places in self.sums:
            self.sums[places] += probabilities_BPT
        else:
            self.sums[places] = probabilities_BPT.clone()
        self.count += 1

    def maps(self) -> torch.Tensor:
        """[B, T, h, w] on the host: the share of each place's attention that each token got; sums to 1 over T."""
        if not self.sums:
            raise ValueError("no cross-attention was recorded: sample within the `with` block first")
        # Enlarging is linear, so the sums are enlarged and not each map.
        first, *others = (self._enlarged(sum_BPT) for sum_BPT in self.sums.values())
        return (sum(others, first) / self.count).cpu()

    def _enlarged(self, sum_BPT: torch.Tensor) -> torch.Tensor:
        places = sum_BPT.shape[1]
        height = max(round((places * self.size[0] / self.size[1]) ** 0.5), 1)
        grid = sum_BPT.transpose(1, 2).unflatten(2, (height, places // height))
        return torch.nn.functional.interpolate(grid, size=self.size, mode="bilinear", align_corners=False)


class _Recorder:
    """An attention processor that calls the processor it replaces, and computes the weights once more."""

    needs_calls = True
    """CUDA-graph replay bypasses this processor (`diffusion.captured`)."""

    def __init__(self, processor: Any, maps: AttentionMaps) -> None:
        self.processor, self.maps = processor, maps
        self.context: torch.Tensor | None = None
        """The context of `key_BHCT`: the same tensor at every step of a drawing."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        if encoder_hidden_states is not None and hidden_states.ndim == 3:
            self.maps.add(self._weights(attn, hidden_states, encoder_hidden_states, attention_mask))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    @torch.no_grad()
    def _weights(self, attn: Any, x_BPC: torch.Tensor, context_BTC: torch.Tensor, mask: Any) -> torch.Tensor:
        """[B, P, T] fp32 attention weights of the condition's rows, averaged over heads."""
        rows = slice(-self.maps.num_images, None)
        # Use the weights directly: merged layers would take a call of them for the model's own.
        linear = torch.nn.functional.linear
        if context_BTC is not self.context:
            key = linear(context_BTC[rows], whole_weight(attn.to_k), attn.to_k.bias).unflatten(-1, (attn.heads, -1))
            self.context, self.key_BHCT = context_BTC, (key.float() * attn.scale).permute(0, 2, 3, 1).contiguous()
        query = linear(x_BPC[rows], whole_weight(attn.to_q), attn.to_q.bias).unflatten(-1, (attn.heads, -1))
        scores_BHPT = query.transpose(1, 2).float() @ self.key_BHCT
        if mask is not None:
            scores_BHPT += mask[rows].reshape(scores_BHPT.shape[0], 1, -1, scores_BHPT.shape[-1])
        return scores_BHPT.softmax(dim=-1).mean(dim=1)


def token_labels(graph: SceneGraph) -> list[tuple[str, int]]:
    """(label, context token) of every object and then every relation."""
    labels, num, first = object_labels(graph), len(graph.relations), SceneGraphConditioner.first_triple
    objects = [(label, first + num + i) for i, label in enumerate(labels)]
    relations = [f"{labels[s]} {predicate} {labels[o]}" for s, predicate, o in graph.relations]
    return [*objects, *((text, first + e) for e, text in enumerate(relations))]


def explain_sheet(image: Image.Image, graph: SceneGraph, maps_Thw: torch.Tensor, side: int = 168) -> Image.Image:
    """The picture, then one overlay for every object and relation: where its token had most of the attention.

    Each map is stretched to its own range, so a token with little attention is visible too; the caption's figure is its
    mean share of the attention over the picture.
    """
    shown = zoomed(image, side) if max(image.size) < side else image.resize((side, side), Image.Resampling.LANCZOS)
    pictures, captions = [shown], ["the picture"]
    for label, token in token_labels(graph):
        pictures.append(_overlay(shown, maps_Thw[token]))
        captions.append(f"{label} ({100 * float(maps_Thw[token].mean()):.1f}%)")
    columns = max(3, min(8, round((1.6 * len(pictures)) ** 0.5)))
    return tiles(pictures, captions, columns)


def _overlay(image: Image.Image, map_hw: torch.Tensor) -> Image.Image:
    """The picture in grey under the colours of one map."""
    heat = torch.nn.functional.interpolate(map_hw[None, None], size=image.size[::-1], mode="bicubic")[0, 0].numpy()
    heat = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-12)
    steps = np.linspace(0, 1, len(_RAMP))
    colour = np.stack([np.interp(heat, steps, _RAMP[:, k]) for k in range(3)], axis=-1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=float)
    weight = 0.25 + 0.5 * heat[..., None]
    return Image.fromarray((grey * (1 - weight) + colour * weight).round().astype(np.uint8))
