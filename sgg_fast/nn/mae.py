"""Masked auto-encoder: predicts the names of masked objects from their surroundings and X_global.

Letters: N objects, B graphs, D width, K name width, I image width.
"""

from __future__ import annotations

import torch
from torch import nn


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

    def forward(
        self, x_ND: torch.Tensor, x_global_BI: torch.Tensor, graph_N: torch.Tensor, ptr_B1: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """x: [N, D] of the masked copies, x_global: [B, I] of the same copies -> predicted targets [N, K].

        graph: [N] graph of each object, ptr: [B+1] first object of each graph, longest: objects of the largest.
        Attention stays within a graph: rows are padded to the largest and the padding is masked.
        """
        graph, ptr = graph_N.long(), ptr_B1.long()
        within = torch.arange(x_ND.shape[0], device=x_ND.device) - ptr[graph] + 1
        rows = x_ND.new_zeros(x_global_BI.shape[0], longest + 1, x_ND.shape[1]).index_put((graph, within), x_ND)
        rows = torch.cat([self.global_in(x_global_BI)[:, None], rows[:, 1:]], dim=1)
        absent = torch.arange(longest + 1, device=x_ND.device) > ptr.diff()[:, None]
        for layer in self.layers:
            rows = layer(rows, src_key_padding_mask=absent)
        return self.out(rows[graph, within])
