"""The SGDiff baseline: the graph encoder of Yang et al., "Diffusion-Based Scene Graph to Image Generation with Masked
Contrastive Pre-Training" (2022), with its published configuration, for the same UNet.

Names have learned embeddings, so the vocabulary is closed: a name outside the training set is all zeros. The encoder
has 1 + 5 plain triple convolutions of one width D (512 in SGDiff, --width here). The global token is a projection of
[mean of objects | mean of predicates]; each of the first 15 triples has a local token, a projection of [s | p | o].
Missing triples are zeros before their projection, and attention covers all 16 tokens. Triples have the order of the
packed graph: relations first, then the relation of every object to the image node, as in SGDiff's data.

Differences: the losses about boxes can be added. Tokens are as wide as the UNet's cross-attention (512 in SGDiff). Null
condition, dropout and guidance are those of the other conditioners (SGDiff samples without guidance). The encoder
trains with the UNet, without SGDiff's contrastive pre-training. Letters: B images, N objects, E relations, D width,
C cross-attention width.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from sgg_fast import ops
from sgg_fast.graph import NameTable, SceneGraphBatch

from .baseline import BaselineConditioner, first_rows
from .conditioner import NULL_TOKENS, GraphCondition
from .encoder import RelationEncoder

NUM_LAYERS = 6
"""One triple convolution, and a stack of five."""
NUM_LOCAL = 15
"""Triples that get a token."""


class SGDiffConditioner(BaselineConditioner, ModelMixin, ConfigMixin):
    """Embeddings, triple convolutions, and 1 + 15 tokens."""

    most_triples = NUM_LOCAL

    @register_to_config
    def __init__(
        self,
        image_dim: int = 512,
        context_dim: int = 768,
        width: int = 512,
        null_tokens: int = NULL_TOKENS,
        trained_names: tuple[str, ...] = (),
        pooled_dim: int = 0,
    ) -> None:
        super().__init__()
        self._add_frame(image_dim, context_dim, pooled_dim, 2 * width)
        self.embedding = nn.Embedding(len(trained_names) + 1, width, padding_idx=0)  # 0: name outside the training set
        self.relation_encoder = RelationEncoder(width, width, NUM_LAYERS, "plain")
        self.to_global = nn.Linear(2 * width, context_dim)
        self.to_local = nn.Linear(3 * width, context_dim)

    def names_of(self, table: NameTable, raw_VD: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding [V] for the table's names."""
        rows = {name: row for row, name in enumerate(self.config.trained_names, start=1)}
        return torch.tensor([rows.get(name, 0) for name in table.names], device=raw_VD.device)

    def forward(self, names_V: torch.Tensor, batch: SceneGraphBatch, states: None = None) -> GraphCondition:
        """The condition of every graph. names: rows of the embedding [V], from `names_of`; states: not read."""
        x_ND, r_ED = self.relation_encoder(self.embedding(names_V), batch)
        objects_BD = ops.graph_mean(x_ND, batch.object_ptr, batch.object_graph)
        relations_BD = ops.graph_mean(r_ED, batch.relation_ptr, batch.relation_graph)
        both_B2D = torch.cat([objects_BD, relations_BD], dim=1)
        global_BC, pooled_BK = self.to_global(both_B2D), self.to_pooled(both_B2D) if self.to_pooled else None
        triples = torch.cat([x_ND[batch.subject.long()], r_ED, x_ND[batch.object.long()]], dim=1)
        own_EC = self.to_local(triples)
        rows_BTC, there_BT = first_rows(batch, own_EC, NUM_LOCAL)
        local_BTC = torch.where(there_BT[..., None], rows_BTC, self.to_local.bias)
        tokens_BTC = torch.cat([global_BC[:, None], local_BTC], dim=1)
        mask_BT = torch.ones(tokens_BTC.shape[:2], dtype=torch.bool, device=x_ND.device)
        return self.condition(tokens_BTC, mask_BT, pooled_BK, own_EC)
