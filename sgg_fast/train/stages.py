"""The computation of one training step: the two stages of SGG-IG as modules from (sample ids, step) to loss terms.

An engine runs them forward and backward. A captured step also needs `store`, `graphs_of`, `buckets` and `packed_terms`:
it packs its batch from a table on the device, padded to the shapes of a `Bucket`. Letters: B samples, K micro-batches
of a step, N objects, E relations, I embedding width.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.config import Config, ObjectiveConfig
from sgg_fast.data.cache import TrainingCache
from sgg_fast.data.moments import MomentRows
from sgg_fast.diffusion import losses, noise
from sgg_fast.graph import SceneGraphBatch
from sgg_fast.nn import lora
from sgg_fast.nn.backbone import added
from sgg_fast.nn.clip import embed_images
from sgg_fast.nn.conditioner import GraphCondition, SceneGraphConditioner
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.geometry import PairGeometry
from sgg_fast.nn.latent_reader import LatentReader, frozen
from sgg_fast.nn.mae import MaskedObjectDecoder, Places
from sgg_fast.nn.placement import AttentionPlacement
from sgg_fast.train.buckets import Bucket, Buckets, ContextBuckets
from sgg_fast.train.graph_negatives import GraphNegatives


@dataclasses.dataclass(frozen=True)
class Terms:
    """The loss of a step and its parts, each with its value at chance."""

    total: torch.Tensor
    """Scalar with gradient."""
    losses: dict[str, torch.Tensor]
    """Detached scalars by name, "loss" first."""
    chance: dict[str, torch.Tensor]
    """Value of each of them at chance."""


Parts = dict[str, tuple[torch.Tensor, torch.Tensor | float]]
"""Parts of a loss by name, each with its value at chance."""


def _terms(total: torch.Tensor, chance: torch.Tensor | float, parts: Parts) -> Terms:
    parts = {"loss": (total, chance), **parts}
    return Terms(
        total=total,
        losses={name: value.detach().float() for name, (value, _) in parts.items()},
        chance={name: c if isinstance(c, torch.Tensor) else total.new_full((), c) for name, (_, c) in parts.items()},
    )


def _geometry(seed: int, conditioner: Conditioner, cache: TrainingCache) -> PairGeometry:
    """Build the head of --geometry; its weights come from the seed."""
    assert cache.boxes is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = conditioner.config.context_dim, conditioner.config.width
        return PairGeometry(*sizes, cache.graphs, cache.boxes)


def _with_boxes(
    objective: ObjectiveConfig, total: torch.Tensor, chance: torch.Tensor | float, parts: Parts
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Add the loss of the boxes, where `parts` has one, to a stage's loss and to its value at chance."""
    for name, weight in (("geometry", objective.geometry), ("attention", objective.attention_loss)):
        value, at_chance = parts.get(name, (0.0, 0.0))
        total, chance = total + weight * value, chance + weight * at_chance
    return total, chance


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A pre-training batch after eqs 3-8: B full copies, optionally B wrong ones, B masked ones, optional padding."""

    batch: SceneGraphBatch
    masked: torch.Tensor
    """[N] bool, objects that are masked for the encoder."""
    x: torch.Tensor
    """[N, D] objects."""
    tokens: torch.Tensor
    """[E, C] relations."""
    x_global: torch.Tensor
    """[2B or 3B, plus 1 with padding, I]."""
    num: int
    """B."""
    first_masked: int
    """Index of the first graph of the masked copies."""
    wrong: torch.Tensor | None = None
    """[B] bool, which of the graphs B .. 2B are wrong; None without graph negatives."""


class PretrainStage(nn.Module):
    """L_pretrain = L_mae + L_con: masked auto-encoder and spatial constraint (eq. 9), weighted by the settings."""

    def __init__(self, config: Config, conditioner: SceneGraphConditioner, cache: TrainingCache) -> None:
        super().__init__()
        self.config, self.cache = config, cache
        objective = config.objective
        self.conditioner = conditioner
        name_dim, image_dim = cache.names.shape[1], cache.images.shape[1]
        self.decoder = MaskedObjectDecoder(conditioner.config.width, name_dim, image_dim)
        self.constraint = losses.SpatialConstraint(objective.contrastive)
        # Frozen inputs in the form that the losses read; tuples keep them out of the state dict.
        names = conditioner.standardise(cache.names)
        self._frozen = (names, conditioner.targets(names), conditioner.centre_images(cache.images))
        self.negatives = GraphNegatives(cache.table, names.device) if objective.graph_negatives else None
        self.geometry = _geometry(config.run.seed, conditioner, cache) if objective.geometry else None
        self.masked_mean: float | None = None
        """Masked objects of a step, a mean over the processes; None if this process has them all."""

    num_micro = 1
    """K."""

    num_shared = 1
    """Words of a captured step's table that `share` writes."""

    def meet(self, ids: np.ndarray, num_processes: int) -> None:
        """Tell the samples of a step of all processes: L_mae is a mean over the masked objects of all of them."""
        num = ops.num_masked(self.store, ids, self.config.objective.mask_ratio)
        self.masked_mean = max(num, 1) / num_processes

    def share(self, table: torch.Tensor) -> None:
        """Write `masked_mean` into the table of a captured step, as bits."""
        if self.masked_mean is not None:
            table[3, -1:].view(torch.float32).fill_(self.masked_mean)

    @property
    def copies(self) -> int:
        """Copies of each graph in a batch: full, wrong (with --graph-negatives), masked."""
        return 3 if self.negatives else 2

    @property
    def num_graphs(self) -> int:
        """Graphs that a batch packs."""
        return self.copies * self.config.optim.batch_size

    @property
    def store(self) -> SceneGraphBatch:
        """All graphs that batches are packed from."""
        return self.cache.graphs

    def graphs_of(self, ids_B: np.ndarray, step: int) -> np.ndarray:
        """Indices in `store` of the graphs that a batch of these samples packs, one kind of copy after the other."""
        return np.tile(ids_B, self.copies)

    def buckets(self) -> Buckets:
        """Shapes of the batches."""
        return Buckets(self.store.sizes, self.config.optim.batch_size, self.copies)

    def packed_terms(self, table: torch.Tensor, bucket: Bucket) -> Terms:
        """Terms of the batch that the table of `ops.draw_table` on the device describes, padded to the bucket."""
        num, mask = self.config.optim.batch_size, self.mask_draw(self.config.optim.batch_size, 0)
        packed = ops.pack_captured(self.store, table, self.num_graphs, mask, bucket=bucket.shape, bounds=bucket.bounds)
        sample_B, step = table[0, :num].long(), table[3, :1]
        num_masked = None if self.masked_mean is None else table[3, -1].view(torch.float32)
        return self.terms(self.encode_packed(*packed, sample_B, step), sample_B, step, num_masked)

    def forward(self, ids: np.ndarray, step: int, bucket: tuple[int, int] | None = None) -> Terms:
        """Terms of the samples `ids` [B] at `step`. A `bucket` pads the batch to (N, E), which changes no term."""
        sample_B = torch.from_numpy(ids).to(self._frozen[0].device)
        return self.terms(self.encode(ids, step, bucket), sample_B, step, self.masked_mean)

    def encode(self, ids: np.ndarray, step: int, bucket: tuple[int, int] | None = None) -> Encoded:
        """Encode all copies in one batch: L_con reads the full one, L_mae the masked one and its own X_global."""
        packed = ops.pack_masked(
            self.cache.graphs, np.tile(ids, self.copies), self.mask_draw(len(ids), step), bucket=bucket
        )
        return self.encode_packed(*packed, torch.from_numpy(ids).to(self._frozen[0].device), step)

    def mask_draw(self, num: int, step: int) -> ops.MaskDraw:
        """The mask draw of a batch of `num` samples."""
        return ops.MaskDraw((self.copies - 1) * num, self.config.objective.mask_ratio, self.config.run.seed, step)

    def encode_packed(
        self, batch: SceneGraphBatch, masked_N: torch.Tensor, sample_B: torch.Tensor, step: int | torch.Tensor
    ) -> Encoded:
        """Encode the copies of the samples `sample`, with optional padding."""
        num, key, wrong_B = len(sample_B), (self.config.run.seed, step, sample_B), None
        if self.negatives:
            batch, wrong_B = self.negatives.falsify(batch, num, *key)
        x_ND, tokens_EC, x_global = self.conditioner.encode(self._frozen[0], batch, masked_N, key)
        return Encoded(batch, masked_N, x_ND, tokens_EC, x_global, num, (self.copies - 1) * num, wrong_B)

    def decode(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predicted targets [B, L, K] of the masked copies' objects, their true names [B, L], and which are masked."""
        batch, first, last = encoded.batch, encoded.first_masked, encoded.first_masked + encoded.num
        longest = int(batch.sizes[first:last, 0].max())
        places = Places.of(batch.object_graph - first, batch.object_ptr[first : last + 1], longest)
        predicted = self.decoder(places.rows(encoded.x), encoded.x_global[first:last], places.present)
        return predicted, places.rows(batch.object_name), places.rows(encoded.masked)

    def terms(
        self,
        encoded: Encoded,
        sample_B: torch.Tensor,
        step: int | torch.Tensor,
        num_masked: float | torch.Tensor | None = None,
    ) -> Terms:
        """Both losses. Shapes depend only on the shapes of the batch, so a step can be captured.

        num_masked: what L_mae's sum is divided by, if not by this batch's masked objects.
        """
        _, targets, images = self._frozen
        predicted, name_BL, masked_BL = self.decode(encoded)
        mae = losses.masked_mse(predicted, targets[name_BL], masked_BL, num_masked)

        objective = self.config.objective
        num_negatives = objective.num_negatives if objective.contrastive == "infonce" else 1

        def draw(rows: slice) -> torch.Tensor:
            return noise.draw_negatives(self.config.run.seed, step, sample_B[rows], num_negatives, len(self.cache))

        negatives = losses.Negatives(images, draw, num_negatives)
        x_global, num, wrong = encoded.x_global, encoded.num, None
        if encoded.wrong is not None:
            wrong = x_global[num : 2 * num], encoded.wrong
        con = self.constraint(x_global[:num], images[sample_B], negatives, wrong)
        con_chance = self.constraint.chance(num_negatives, wrong[1].float().mean() if wrong else 0.0)
        mae_chance = masked_BL.any().float()  # a batch of one-object graphs masks nothing and its loss is 0
        if num_masked is not None:
            mae_chance = masked_BL.sum() / num_masked
        mae_weight, con_weight = objective.mae_weight, objective.con_weight
        total, chance = mae_weight * mae + con_weight * con, mae_weight * mae_chance + con_weight * con_chance
        parts: Parts = {"mae": (mae, mae_chance), "con": (con, con_chance)}
        if self.geometry:
            parts["geometry"] = self.geometry(encoded.tokens, encoded.batch, sample_B)
        return _terms(*_with_boxes(objective, total, chance, parts), parts)


class FinetuneStage(nn.Module):
    """L = lambda L_diff + (1 - lambda) L_ISA (eqs 10-12) through the UNet, or its adapters, and the graph modules."""

    def __init__(self, config: Config, conditioner: Conditioner, foundation: Foundation, cache: TrainingCache) -> None:
        super().__init__()
        self.config, self.cache = config, cache
        objective = config.objective
        self.unet = lora.train(foundation.unet).train()
        self.conditioner = conditioner.requires_grad_(True)
        self.store = cache.graphs.with_bare() if objective.relation_dropout else cache.graphs
        """All graphs that batches are packed from; with --relation-dropout each once more without its relations."""
        for name, parameter in conditioner.named_parameters():
            if name.endswith("mask_token"):  # only pre-training uses it
                parameter.requires_grad_(False)
        names = conditioner.names_of(cache.table, cache.names)
        alpha_bar = foundation.scheduler.alphas_cumprod.to(names.device)
        # A tuple keeps the frozen models out of the parameters and the state dict.
        self._frozen = (names, conditioner.centre_images(cache.images), alpha_bar, foundation)
        height, width = (side * foundation.latent_factor for side in cache.latent_shape[1:])
        self._target_12 = torch.tensor([[height, width]], dtype=torch.float32, device=names.device)
        self.geometry = _geometry(config.run.seed, conditioner, cache) if objective.geometry else None
        self.placement = None
        if objective.attention_loss:
            assert cache.boxes is not None
            self.placement = AttentionPlacement(
                foundation.unet, cache.graphs, cache.boxes, conditioner.first_triple, conditioner.most_triples
            )
        self.reader = None
        if objective.image_embedding == "latent":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed)
                self.reader = LatentReader(foundation.vae.config.latent_channels, cache.images.shape[1])

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Terms of the samples `ids` [B] at `step`."""
        if isinstance(self.cache.moments, MomentRows):
            self.cache.moments.bring(ids, self._frozen[0].device)
        graphs = self.graphs_of(ids, step)
        graph_B = torch.from_numpy(graphs).to(self._frozen[0].device)
        return self.terms(ops.pack(self.store, graphs), graph_B, step)

    @property
    def foundation(self) -> Foundation:
        """The models that the stage starts from; all except the UNet are frozen."""
        return self._frozen[3]

    @property
    def num_micro(self) -> int:
        """K."""
        return self.config.optim.accumulation_steps

    @property
    def num_graphs(self) -> int:
        """Graphs that a micro-batch packs."""
        return self.config.optim.batch_size

    num_shared = 0
    """Words of a captured step's table that `share` writes."""

    def share(self, table: torch.Tensor) -> None:
        """Nothing: every loss is a mean over images."""

    def graphs_of(self, ids_B: np.ndarray, step: int) -> np.ndarray:
        """[B] indices in `store` of the samples' graphs at `step`; --relation-dropout selects ones without
        relations."""
        if not self.config.objective.relation_dropout:
            return ids_B
        share = self.config.objective.relation_dropout
        bare = noise.draw_share(self.config.run.seed, step, torch.from_numpy(ids_B), share, noise.STREAM_BARE)
        return ids_B + len(self.cache) * bare.numpy()

    def buckets(self) -> ContextBuckets:
        """Shapes of the micro-batches, from the samples' whole graphs: a drawn graph is no larger."""
        return ContextBuckets(self.cache.graphs.sizes, self.config.optim.batch_size)

    def packed_terms(self, table: torch.Tensor, bucket: Bucket) -> Terms:
        """Terms of the micro-batch that the table of `ops.draw_table` on the device describes, padded to the bucket."""
        num = self.num_graphs
        batch, _ = ops.pack_captured(self.store, table, num, None, bucket=bucket.shape, bounds=bucket.bounds)
        return self.terms(batch, table[0, :num].long(), table[3, :1])

    def terms(self, batch: SceneGraphBatch, graph_B: torch.Tensor, step: int | torch.Tensor) -> Terms:
        """The losses of samples with the graphs `batch`, number `graph` [B] of `store`; `batch` may end in padding.

        As a device tensor [1] the step may change under a captured launch.
        """
        names, images, alpha_bar, foundation = self._frozen
        config, objective, latent_shape = self.config, self.config.objective, self.cache.latent_shape
        sample_B = graph_B % len(self.cache)
        key = (config.run.seed, step, sample_B)
        z_0 = self.cache.latents(sample_B, ops.hash_normal(latent_shape, *key, noise.STREAM_POSTERIOR))
        z_0 = z_0 * foundation.vae.config.scaling_factor
        eps = ops.hash_normal(latent_shape, *key, noise.STREAM_NOISE)
        t_B = noise.draw_timesteps(*key, len(alpha_bar))
        kept_B = ~noise.draw_share(*key, objective.condition_dropout, noise.STREAM_DROP)
        abar_B, kind = alpha_bar[t_B], foundation.scheduler.config.prediction_type

        codes = (key,) if config.model.instance_codes else ()
        condition = self.conditioner(names, batch, self._text_states(sample_B), *codes)
        if batch.num_graphs > len(sample_B):
            condition = condition.first(len(sample_B))
        given = self.conditioner.drop(condition, ~kept_B)
        z_t = noise.add_noise(z_0, eps, abar_B)
        dtype = self.unet.dtype
        reads = {"encoder_attention_mask": given.mask, "added_cond_kwargs": self._added(given, sample_B)}
        with self.placement.looking() if self.placement else contextlib.nullcontext():
            predicted = self.unet(z_t.to(dtype), t_B, given.context.to(dtype), **reads).sample
        diff_chance_B = losses.min_snr_weight(kind, abar_B, objective.min_snr_gamma)
        diff_B = diff_chance_B * losses.diffusion_loss(predicted, noise.target_of(kind, z_0, eps, abar_B))

        pred_x0 = None
        if objective.image_embedding in ("predicted", "latent"):
            pred_x0 = noise.predicted_z0(kind, predicted.float(), z_t, abar_B)
        isa_B, isa_chance_B = self._alignment(sample_B, t_B, z_t, pred_x0, condition.x_global)
        total = losses.total_loss(diff_B, isa_B, kept_B, objective.loss_weight)
        chance = losses.total_loss(diff_chance_B, isa_chance_B, kept_B, objective.loss_weight)
        isa, isa_chance = (isa_B * kept_B).mean(), (isa_chance_B * kept_B).mean()
        parts: Parts = {"diff": (diff_B.mean(), diff_chance_B.mean()), "isa": (isa, isa_chance)}
        if self.reader and pred_x0 is not None:  # trained by its own loss only
            parts["reader"] = losses.alignment_loss(images[sample_B], self.reader(pred_x0.detach(), t_B)).mean(), 1.0
            total, chance = total + parts["reader"][0], chance + 1
        if self.placement:
            size = z_t.shape[2], z_t.shape[3]
            parts["attention"] = self.placement.loss(given.mask, batch, sample_B, kept_B, size)
        if self.geometry:
            parts["geometry"] = self.geometry(condition.tokens, batch, sample_B)
        return _terms(*_with_boxes(objective, total, chance, parts), parts)

    def _text_states(self, sample_B: torch.Tensor) -> torch.Tensor | None:
        """Text input of the conditioner: the states of all phrases, or those of the samples' own texts.

        The latter are computed here, because all of them are too many to keep.
        """
        if self.cache.texts is None:
            return self.cache.phrases
        return self.foundation.towers.rows(self.cache.texts[sample_B])[0]

    def _added(self, given: GraphCondition, sample_B: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """What SDXL's UNet reads beside the context: the pooled vectors, and `Backbone.sizes` of the samples."""
        if given.pooled is None:
            return None
        assert self.cache.sizes is not None
        sizes_B6 = torch.cat([self.cache.sizes[sample_B], self._target_12.expand(len(sample_B), -1)], dim=1)
        return added(given.pooled.to(self.unet.dtype), sizes_B6)

    def _alignment(
        self,
        sample_B: torch.Tensor,
        t_B: torch.Tensor,
        z_t: torch.Tensor,
        pred_x0: torch.Tensor | None,
        x_global: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L_ISA (eq. 10) of each image and its value at chance, both [B].

        pred_x0: the clean latents that the UNet's predictions imply, if the prediction has a branch of its own. In that
        branch X_global is detached, and follows the clean image instead.
        """
        form, images_BI, abar_B = self.config.objective.image_embedding, self._frozen[1][sample_B], self._frozen[2][t_B]
        if form == "noisy-image":
            with torch.no_grad():
                images_BI = self._seen(z_t)
        weight_B = losses.alignment_weight(abar_B, self.config.objective.alignment_weight)
        clean_B = losses.alignment_loss(images_BI, x_global, abar_B.sqrt() if form == "noised" else 1.0)
        if pred_x0 is None:
            return weight_B * clean_B, weight_B
        if self.reader:
            with frozen(self.reader):
                seen_BI = self.reader(pred_x0, t_B)
        else:
            seen_BI = self._seen(pred_x0)
        return weight_B * (clean_B + losses.alignment_loss(seen_BI, x_global.detach())), 2 * weight_B

    def _seen(self, z: torch.Tensor) -> torch.Tensor:
        """CLIP embeddings of the decoded latents, centred, [B, I]."""
        foundation = self._frozen[3]
        vae = foundation.vae
        pixels = vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample
        return self.conditioner.centre_images(embed_images(foundation.clip, pixels))


Stage = PretrainStage | FinetuneStage
"""A module that an engine runs."""


def checkpoint_state(stage: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a stage that a checkpoint holds: all but the weights of a UNet that do not train (--lora)."""
    fixed = {name for name, p in stage.named_parameters() if name.startswith("unet.") and not p.requires_grad}
    return {name: tensor for name, tensor in stage.state_dict().items() if name not in fixed}
