"""Masked auto-encoder: predicts the names of masked objects from their surroundings and X_global.

Letters: N objects, B graphs, L rows of the largest graph, D width, K name width, I image width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Places:
    """The row of each packed object in its graph: B graphs, L rows each.

    Objects outside the B graphs (other copies, padding) share one extra row, which is removed.
    """

    graph: torch.Tensor
    """[N] int64, B for objects outside the B graphs."""
    within: torch.Tensor
    present: torch.Tensor
    """[B, L] bool."""

    @classmethod
    def of(cls, graph_N: torch.Tensor, ptr_B1: torch.Tensor, longest: int) -> Places:
        """graph: [N], outside 0..B-1 for objects outside the graphs; ptr: [B+1] first object of a graph; longest: L."""
        ptr = ptr_B1.long()
        num = len(ptr) - 1
        inside_N = (graph_N >= 0) & (graph_N < num)
        first_N = ptr[graph_N.long().clamp(0, num - 1)]
        within_N = torch.arange(len(graph_N), device=ptr.device) - first_N
        present_BL = torch.arange(longest, device=ptr.device) < ptr.diff()[:, None]
        outside_N = ~inside_N
        return cls(graph_N.long().masked_fill(outside_N, num), within_N.masked_fill(outside_N, 0), present_BL)

    def rows(self, values_N: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, L, ...], zeros in rows without an object. No host decision, no sum: backward is a gather."""
        num, longest = self.present.shape
        rows = values_N.new_zeros(num + 1, longest, *values_N.shape[1:])
        return rows.index_put((self.graph, self.within), values_N)[:num]


class MaskedObjectDecoder(nn.Module):
    """A two-layer transformer over [X_global, objects of one graph] -> frozen name embeddings."""

    def __init__(self, width: int, name_dim: int, image_dim: int, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.global_in = nn.Linear(image_dim, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, name_dim))

    def forward(self, x_BLD: torch.Tensor, x_global_BI: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
        """Objects x and x_global of the masked copies -> predicted targets [B, L, K].

        Attention stays within a graph and ignores rows that are not present.
        """
        rows = torch.cat([self.global_in(x_global_BI)[:, None], x_BLD], dim=1)
        absent = nn.functional.pad(~present_BL, (1, 0))
        for layer in self.layers:
            rows = layer(rows, src_key_padding_mask=absent)
        return self.out(rows[:, 1:])
