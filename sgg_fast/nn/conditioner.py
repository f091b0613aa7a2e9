"""Scene graphs to Stable Diffusion's cross-attention context: SGG-IG eqs 3-8, calibration and null condition.

It saves and loads like any diffusers model (`save_pretrained`, safetensors only). Letters: B images, N objects,
E relations, T context tokens, D graph width, C cross-attention width, K width of SDXL's pooled vector, V names,
I width of image embeddings. A row [C + K] is a text state with the pooled state behind it (`clip.TextTowers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from sgg_fast import ops
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch

from .clip import TextTowers
from .encoder import RelationEncoder
from .instances import CODE_WIDTH, CodeKey, instance_codes

MIN_TOKENS = 80
"""Context length of graphs with up to 78 triples; it also holds the null condition's 77 states."""

NULL_TOKENS = 77
"""Length of CLIP's text context."""


def context_length(most_triples: int, null_tokens: int = NULL_TOKENS) -> int:
    """T: 80, or the next multiple of 16 that holds the start token, X_global and every triple.

    With a null condition of fewer than CLIP's 77 states: the next multiple of 8 that holds it and all these tokens.
    """
    if null_tokens < NULL_TOKENS:
        return -(-max(null_tokens, most_triples + 2) // 8) * 8
    return max(MIN_TOKENS, -(-(most_triples + 2) // 16) * 16)


def pooled_phrases(phrases_PK: torch.Tensor, batch: SceneGraphBatch) -> torch.Tensor:
    """[B, K] fp32: the mean of the pooled states of a graph's phrases, scaled to their mean length.

    A mean of different directions is shorter than each, but the UNet was trained with whole ones. 0 for no phrases.
    """
    told_EK = phrases_PK[batch.phrase.long()].float()
    length_E1 = told_EK.norm(dim=1, keepdim=True)
    mean_BK, length_B1 = (ops.graph_mean(x, batch.relation_ptr, batch.relation_graph) for x in (told_EK, length_E1))
    return mean_BK * (length_B1 / mean_BK.norm(dim=1, keepdim=True).clamp(min=1e-6))


class GraphCondition(NamedTuple):
    """The condition of a batch of graphs for the UNet. A tuple, so that ZeRO-3's hooks find the tensors."""

    context: torch.Tensor
    """[B, T, C] tokens."""
    mask: torch.Tensor
    """[B, T] bool, False for tokens that attention ignores."""
    x_global: torch.Tensor
    """[B, I] graph embedding in the space of the centred image embeddings."""
    tokens: torch.Tensor | None = None
    """[E, C] token of each triple of the batch, before a text state is added."""
    pooled: torch.Tensor | None = None
    """[B, K] pooled vector; None for a UNet that reads none."""

    def first(self, num: int) -> GraphCondition:
        """The condition of the first `num` graphs; `tokens` stays whole."""
        context, mask, x_global, tokens, pooled = self
        return GraphCondition(
            context[:num], mask[:num], x_global[:num], tokens, None if pooled is None else pooled[:num]
        )


class ConditionerBase(nn.Module):
    """What every conditioner has beside its graph modules: null condition, dropout, centred images. A diffusers mixin.

    Buffers, measured once from the frozen models: `image_mean`, and SD's own text states `start_state`, `null_states`
    and, where the UNet reads a pooled vector, `null_pooled`. `to_pooled` is the linear map to that vector, or None.
    """

    config: Any
    null_states: torch.Tensor
    start_state: torch.Tensor
    null_pooled: torch.Tensor | None
    image_mean: torch.Tensor
    to_pooled: nn.Linear | None
    register_to_config: Any
    save_pretrained: Any
    first_triple = 1
    """Context tokens before the triples."""
    most_triples: int | None = None
    """Triples that have a token; None for all."""

    def _add_frame(self, image_dim: int, context_dim: int, pooled_dim: int, pooled_from: int) -> None:
        """pooled_from: width of the vector that `to_pooled` maps; 0 for no map. The map starts at 0."""
        self.register_buffer("image_mean", torch.zeros(image_dim))
        self.register_buffer("start_state", torch.zeros(context_dim))
        self.register_buffer("null_states", torch.zeros(NULL_TOKENS, context_dim))
        self.register_buffer("null_pooled", torch.zeros(pooled_dim) if pooled_dim else None)
        self.to_pooled = None
        if pooled_dim and pooled_from:
            self.to_pooled = nn.Linear(pooled_from, pooled_dim)
            nn.init.zeros_(self.to_pooled.weight)
            nn.init.zeros_(self.to_pooled.bias)

    @torch.no_grad()
    def calibrate_null(self, null_rows: torch.Tensor, zeros: bool = False) -> None:
        """Set the start token and the null condition from SD's rows [77, C + K] of the empty text.

        zeros: the model was trained with zeros for the empty text; the start token is the text's all the same.
        """
        states_TC, pooled_K = null_rows[:, : len(self.start_state)], null_rows[0, len(self.start_state) :]
        self.start_state.copy_(states_TC[0])
        self.null_states.copy_(states_TC * (not zeros))
        if self.null_pooled is not None:
            self.null_pooled.copy_(pooled_K * (not zeros))

    @torch.no_grad()
    def calibrate_pooled(self, name_rows: torch.Tensor) -> None:
        """Start the pooled vector at the mean pooled state of the vocabulary, from its rows [M, C + K]."""
        if self.to_pooled is not None:
            self.to_pooled.bias.copy_(name_rows[:, len(self.start_state) :].mean(0))

    def centre_images(self, embedding_BI: torch.Tensor) -> torch.Tensor:
        """Raw CLIP image embeddings [B, I] -> training-set mean removed, then unit norm."""
        unit = nn.functional.normalize(embedding_BI, dim=-1)
        return nn.functional.normalize(unit - self.image_mean, dim=-1)

    def null_condition(self, num_images: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, T, C], [B, T] bool) of the empty text: the first `null_tokens` states of "" (all 77 for Stable
        Diffusion), then masked padding.
        """  # fmt: skip
        num = self.config.null_tokens
        padded = nn.functional.pad(self.null_states[:num], (0, 0, 0, length - num))
        mask = torch.arange(length, device=padded.device) < num
        return padded.expand(num_images, -1, -1), mask.expand(num_images, -1)

    def drop(self, condition: GraphCondition, dropped_B: torch.Tensor) -> GraphCondition:
        """`condition`, with the null condition for images with dropped [B] set (classifier-free guidance, eq. 2)."""
        null_context, null_mask = self.null_condition(*condition.context.shape[:2])
        pooled_BK = condition.pooled
        if pooled_BK is not None:
            assert self.null_pooled is not None
            pooled_BK = torch.where(dropped_B[:, None], self.null_pooled.to(pooled_BK.dtype), pooled_BK)
        return GraphCondition(
            torch.where(dropped_B[:, None, None], null_context.to(condition.context.dtype), condition.context),
            torch.where(dropped_B[:, None], null_mask, condition.mask),
            condition.x_global,
            condition.tokens,
            pooled_BK,
        )


class SceneGraphConditioner(ConditionerBase, ModelMixin, ConfigMixin):
    """Relation encoder (eqs 3-6), triple embedding (eq. 7), X_global and context (eq. 8).

    Further buffers, measured once from the frozen models: `name_mean`, `name_scale` (centre and unit RMS of the
    vocabulary's CLIP embeddings), `target_mean`, `target_std` (per dimension, over the training objects).
    """

    name_mean: torch.Tensor
    name_scale: torch.Tensor
    target_mean: torch.Tensor
    target_std: torch.Tensor
    first_triple = 2
    """The start token and the token of X_global."""

    @register_to_config
    def __init__(
        self,
        name_dim: int = 512,
        image_dim: int = 512,
        context_dim: int = 768,
        width: int = 512,
        num_layers: int = 6,
        encoder: str = "residual",
        triple: str = "roles",
        context: str = "triples",
        token_init: str = "none",
        gate_init: float = 0.0,
        instance_codes: bool = False,
        null_tokens: int = NULL_TOKENS,
        trained_names: tuple[str, ...] = (),
        pooled_dim: int = 0,
    ) -> None:
        super().__init__()
        self.relation_encoder = RelationEncoder(name_dim, width, num_layers, encoder)
        self.f_subject = nn.Linear(width, 2 * width)
        self.f_object = None if triple == "shared" else nn.Linear(width, 2 * width)  # shared: f_subject serves both
        self.f_relation = nn.Linear(width, 2 * width)
        self.f_instance = nn.Linear(CODE_WIDTH, width, bias=False) if instance_codes else None
        self.f_global = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, context_dim))
        self.to_global = nn.Linear(context_dim, image_dim)
        self.from_global = nn.Linear(image_dim, context_dim)
        self.token_norm = nn.LayerNorm(context_dim)
        # Text initialisation: gates of the graph's share, for X_global's token and for the triples' tokens.
        self.gates = nn.Parameter(torch.full((2, context_dim), gate_init)) if token_init == "text" else None
        self._add_frame(image_dim, context_dim, pooled_dim, image_dim)
        self.register_buffer("name_mean", torch.zeros(name_dim))
        self.register_buffer("name_scale", torch.ones(()))
        self.register_buffer("target_mean", torch.zeros(name_dim))
        self.register_buffer("target_std", torch.ones(name_dim))

    @torch.no_grad()
    def calibrate_names(self, raw_VD: torch.Tensor, object_name_ids: torch.Tensor) -> None:
        """Set the name and target statistics from raw CLIP embeddings [V, name_dim] of the vocabulary.

        object_name_ids: [any] name id of every training object, repeats kept, so that the mean of the targets has a
        loss of exactly 1.
        """
        self.name_mean.copy_(raw_VD.mean(0))
        centred = raw_VD - self.name_mean
        self.name_scale.copy_(centred.square().mean().sqrt().clamp(min=1e-8).reciprocal())
        occurring = self.standardise(raw_VD)[object_name_ids.long()].double()
        self.target_mean.copy_(occurring.mean(0))
        self.target_std.copy_(occurring.std(0, unbiased=False).clamp(min=1e-6))

    @torch.no_grad()
    def calibrate_tokens(self, name_rows: torch.Tensor) -> None:
        """Start the token norm's gain and bias at the statistics of SD's rows of the vocabulary [M, C + K].

        The pooled vector starts at their mean, or with text initialisation at the phrases' own.
        """
        if self.gates is None:
            self.calibrate_pooled(name_rows)
        name_states_MC = name_rows[:, : len(self.start_state)]
        self.token_norm.weight.copy_(name_states_MC.std(0).clamp(min=1e-3))
        self.token_norm.bias.copy_(name_states_MC.mean(0))

    def standardise(self, raw_VD: torch.Tensor) -> torch.Tensor:
        """Raw CLIP name embeddings [V, name_dim] -> centred, with unit RMS over the vocabulary."""
        return (raw_VD - self.name_mean) * self.name_scale

    def names_of(self, table: NameTable, raw_VD: torch.Tensor) -> torch.Tensor:
        """The `names` argument of `forward` for `table`, from its raw CLIP embeddings [V, name_dim]."""
        return self.standardise(raw_VD)

    def read(
        self,
        graphs: Sequence[SceneGraph],
        table: NameTable,
        towers: TextTowers | None,
    ) -> torch.Tensor | None:
        """The text argument of `forward`: SD's rows of the table's phrases [P, C + K], or None if it needs none."""
        if self.config.token_init != "text":
            return None
        assert towers is not None, "text initialisation needs SD's text encoder"
        return towers.phrases(table.phrases)

    def targets(self, names_VD: torch.Tensor) -> torch.Tensor:
        """Standardised name embeddings -> targets of the auto-encoder: zero mean, unit variance per dimension."""
        return (names_VD - self.target_mean) / self.target_std

    def encode(
        self,
        names_VD: torch.Tensor,
        batch: SceneGraphBatch,
        masked_N: torch.Tensor | None = None,
        code_key: CodeKey | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Eqs 3-8 up to X_global: (x [N, D], tokens [E, C], x_global [B, I]). names: [V, name_dim] standardised.

        code_key: hash key of the instance codes, in training.
        """
        x_ND, r_ED = self.relation_encoder(names_VD, batch, masked_N)
        pool_B2D = ops.masked_pool(x_ND, r_ED, batch)
        coded_ND = x_ND
        if self.f_instance is not None:
            coded_ND = x_ND + self.f_instance(instance_codes(batch, masked_N, code_key).to(x_ND.dtype))
        f_object = self.f_object or self.f_subject
        s_N2D = nn.functional.linear(coded_ND, self.f_subject.weight)
        rel_E2D = ops.triple_context(
            s_N2D,
            nn.functional.linear(r_ED, self.f_relation.weight),
            s_N2D if self.f_object is None else nn.functional.linear(coded_ND, f_object.weight),
            pool_B2D,
            self.f_subject.bias + self.f_relation.bias + f_object.bias,
            batch,
        )
        tokens_EC = self.f_global(rel_E2D)
        mean_BC = ops.graph_mean(tokens_EC, batch.relation_ptr, batch.relation_graph)
        return x_ND, tokens_EC, self.to_global(mean_BC)

    def forward(
        self,
        names_VD: torch.Tensor,
        batch: SceneGraphBatch,
        phrases: torch.Tensor | None = None,
        code_key: CodeKey | None = None,
    ) -> GraphCondition:
        """The condition of every graph of the batch. names: [V, name_dim] standardised name embeddings.

        T fits the longest graph by `batch.sizes`, which are upper bounds in a captured step. phrases: [P, C + K] SD's
        end-of-text row of each phrase of the table, with `token_init` "text". A triple's token is then the state of its
        phrase plus gate * the graph's token; the gate starts at `gate_init`. The pooled vector is a linear map of
        X_global, which starts at a constant (`calibrate_pooled`), or at `pooled_phrases` with the phrases.
        """
        _, own_EC, x_global = self.encode(names_VD, batch, code_key=code_key)
        length = context_length(int(batch.sizes[:, 1].max()), self.config.null_tokens)
        num_images = batch.num_graphs
        global_BC = self.token_norm(self.from_global(x_global))
        tokens_EC = self.token_norm(own_EC)
        if self.gates is not None:
            assert phrases is not None, "text initialisation needs the phrases' states"
            global_BC = self.gates[0].to(global_BC.dtype) * global_BC
            told_EC = phrases[:, : tokens_EC.shape[1]][batch.phrase]
            tokens_EC = told_EC.to(tokens_EC.dtype) + self.gates[1].to(tokens_EC.dtype) * tokens_EC
        start_BC = self.start_state.to(global_BC.dtype).expand(num_images, -1)
        context = torch.stack([start_BC, global_BC], dim=1)
        context = nn.functional.pad(context, (0, 0, 0, length - self.first_triple))
        position = torch.arange(length, device=context.device)
        if self.config.context == "global":  # eq. 11 as printed: X_global is the only condition
            mask = (position == 1).expand(num_images, -1)
            return GraphCondition(context, mask, x_global, own_EC, self._pooled(x_global, batch, phrases))
        within_E = torch.arange(batch.num_relations, device=context.device)
        within_E = within_E - batch.relation_ptr.long()[batch.relation_graph.long()]
        # Only the padding graph can exceed its context; its rows are not read.
        token_E = (within_E + self.first_triple).clamp(max=length - 1)
        context = context.index_put((batch.relation_graph.long(), token_E), tokens_EC)
        mask = position < batch.relation_ptr.long().diff()[:, None] + self.first_triple
        return GraphCondition(context, mask, x_global, own_EC, self._pooled(x_global, batch, phrases))

    def _pooled(
        self, x_global_BI: torch.Tensor, batch: SceneGraphBatch, phrases: torch.Tensor | None
    ) -> torch.Tensor | None:
        """[B, K], or None if the UNet reads none."""
        if self.to_pooled is None:
            return None
        pooled_BK = self.to_pooled(x_global_BI)
        if self.gates is None or phrases is None:
            return pooled_BK
        return pooled_BK + pooled_phrases(phrases[:, len(self.start_state) :], batch).to(pooled_BK.dtype)
