"""Shared parts of the baselines: conditioners for the same UNet in place of SGG-IG's, chosen by `--conditioner`.

They train in the same fine-tuning stage with the same null condition and dropout, by L_diff alone. They have no
X_global, so no pre-training and no L_ISA. Letters: B images, E relations, T context tokens, C cross-attention width,
I width of image embeddings, V names, K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch

from .clip import TextTowers
from .conditioner import ConditionerBase, GraphCondition, context_length


class BaselineConditioner(ConditionerBase):
    """A conditioner without X_global.

    Each subclass names `ModelMixin` in its own file, because diffusers looks there for the loader of a pipeline's part.
    """

    save_pretrained: Any

    def names_of(self, table: NameTable, raw_VD: torch.Tensor) -> torch.Tensor:
        """`raw` unchanged: the `names` argument of `forward`."""
        return raw_VD

    def read(
        self,
        graphs: Sequence[SceneGraph],
        table: NameTable,
        towers: TextTowers | None,
    ) -> torch.Tensor | None:
        """None: `forward` needs no text states."""
        return None

    def condition(
        self,
        tokens_BTC: torch.Tensor,
        mask_BT: torch.Tensor,
        pooled_BK: torch.Tensor | None = None,
        own_EC: torch.Tensor | None = None,
    ) -> GraphCondition:
        """The tokens, padded (masked) to a length that holds the null condition, and an X_global of zeros.

        own: a token of every triple, for the loss of --geometry.
        """
        least = context_length(0, self.config.null_tokens)
        missing = max(0, least - tokens_BTC.shape[1])
        return GraphCondition(
            nn.functional.pad(tokens_BTC, (0, 0, 0, missing)),
            nn.functional.pad(mask_BT, (0, missing)),
            tokens_BTC.new_zeros(len(tokens_BTC), len(self.image_mean)),
            own_EC,
            pooled=None if self.null_pooled is None else pooled_BK,
        )


def first_rows(batch: SceneGraphBatch, rows_EK: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [B, num, K] of the first `num` relations of every graph, zero for missing ones; which rows exist)."""
    start_B1, stop_B1 = (ptr.long()[:, None] for ptr in (batch.relation_ptr[:-1], batch.relation_ptr[1:]))
    index = start_B1 + torch.arange(num, device=rows_EK.device)
    there = index < stop_B1
    return rows_EK[index.clamp(max=len(rows_EK) - 1)] * there[..., None].to(rows_EK.dtype), there
