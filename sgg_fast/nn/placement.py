"""Auxiliary loss that ties the cross-attention of each object's token to the object's box; training only.

At high noise the picture does not show positions yet, so attention to an object's token decides the object's position.
Without this loss the UNet learns positions last: a token with a position is useless until the UNet's pixels
distinguish left from right. The loss trains the share of a token's attention that falls into its box (after the token
loss of TokenCompose, Wang et al., CVPR 2024, with boxes for masks). Inference needs no boxes.
Letters: B images, T context tokens, A = B x heads, P = h w pixels of a layer, E relations of the batch, N objects of
the set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sgg_fast.graph import SceneGraphBatch

from .geometry import LEAST_SIDE, sample_shares, set_rows


class AttentionPlacement:
    """-log of the share of a token's attention in its object's box; mean over cross-attentions, images, objects.

    Hooks read the queries and keys of the layers and compute the attention weights from them, beside any attention
    kernel of the model.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        store: SceneGraphBatch,
        boxes_N4: torch.Tensor,
        first_triple: int,
        most_triples: int | None = None,
    ) -> None:
        """boxes: x0, y0, x1, y1 in picture units of every object of `store`, which holds the set's graphs.

        first_triple: context tokens before the triples. most_triples: triples that have a token; None for all.
        """
        self.boxes_N4, self.store_ptr = boxes_N4.float(), store.object_ptr
        self.first_triple, self.most_triples = first_triple, most_triples
        self.layers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
        self._looking, self._seen = False, dict[nn.Module, torch.Tensor]()
        for layer in self.layers:
            layer.to_q.register_forward_hook(self._look)
            layer.to_k.register_forward_hook(self._look)

    def _look(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if self._looking:
            self._seen[module] = out

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Context for the UNet call that `loss` reads; recomputation in backward is not recorded."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False

    def loss(
        self,
        mask_BT: torch.Tensor,
        batch: SceneGraphBatch,
        sample_B: torch.Tensor,
        kept_B: torch.Tensor,
        size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of the last call, loss of uniform attention); an image without objects adds 0.

        mask: mask of the UNet's context. kept: bool, True if the condition was not dropped. size: of the latents.
        """
        own_E, graph_E, shift_E = set_rows(batch, sample_B, self.store_ptr)
        box_E4 = self.boxes_N4[(batch.subject + shift_E) * own_E]
        visible_E = ((box_E4[:, 2:] - box_E4[:, :2]) >= LEAST_SIDE).all(dim=1)
        counts_E = own_E & (batch.relation_pooled == 0) & visible_E & kept_B[graph_E]
        within_E = torch.arange(batch.num_relations, device=graph_E.device) - batch.relation_ptr.long()[graph_E]
        # Later tokens are padding, or the null condition's, and that does not count.
        num_tokens = min(self.first_triple + int(batch.sizes[:, 1].max()), mask_BT.shape[1])
        if self.most_triples is not None:
            counts_E = counts_E & (within_E < self.most_triples)
        token_E = (within_E + self.first_triple).clamp(0, num_tokens - 1)
        weight_E = sample_shares(counts_E, batch, len(sample_B))
        mask_BT = mask_BT[:, :num_tokens]
        bias_BT = torch.zeros_like(mask_BT, dtype=torch.float32).masked_fill(~mask_BT, -torch.inf)
        loss, even = weight_E.new_zeros(()), weight_E.new_zeros(())
        coverage: dict[int, torch.Tensor] = {}  # by number of pixels: layers of one resolution share it
        for layer in self.layers:
            q_BPC, k_BTC = self._seen.pop(layer.to_q), self._seen.pop(layer.to_k)[:, :num_tokens]
            map_BPT = _weights(q_BPC, k_BTC, layer, bias_BT)
            map_EP = map_BPT[graph_E, :, token_E]
            num_places = map_EP.shape[1]
            if num_places not in coverage:
                width = round((num_places * size[1] / size[0]) ** 0.5)
                coverage[num_places] = _coverage(box_E4, num_places // width, width)
            inside_EP = coverage[num_places]
            share_E = (map_EP * inside_EP).sum(1) / map_EP.sum(1).clamp(min=1e-6)
            loss = loss - (share_E.clamp(min=1e-4).log() * weight_E).sum()
            even = even - (inside_EP.mean(1).clamp(min=1e-4).log() * weight_E).sum()
        return loss / len(self.layers), even / len(self.layers)


def _weights(q_BPC: torch.Tensor, k_BTC: torch.Tensor, layer: Any, bias_BT: torch.Tensor) -> torch.Tensor:
    """[B, P, T] fp32 attention weights, mean over heads."""
    heads = layer.heads
    query_APC, key_ATC = (x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1).float() for x in (q_BPC, k_BTC))
    bias_A1T = bias_BT[:, None].expand(-1, heads, -1).flatten(0, 1)[:, None]
    score_APT = torch.baddbmm(bias_A1T, query_APC, key_ATC.transpose(1, 2), alpha=layer.scale)
    return score_APT.softmax(dim=-1).unflatten(0, (-1, heads)).mean(dim=1)


def _coverage(box_E4: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[E, h w]: the share of each pixel that lies in the box."""
    sides = []
    for low_E, high_E, num in ((box_E4[:, 1], box_E4[:, 3], height), (box_E4[:, 0], box_E4[:, 2], width)):
        edge = torch.arange(num + 1, device=box_E4.device)
        high = torch.minimum(high_E[:, None] * num, edge[1:])
        sides.append((high - torch.maximum(low_E[:, None] * num, edge[:-1])).clamp(min=0))
    return (sides[0][:, :, None] * sides[1][:, None, :]).flatten(1)
