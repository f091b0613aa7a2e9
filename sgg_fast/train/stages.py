"""What one training step computes: the two stages of SGG-IG as modules from (sample ids, step) to loss terms.

An engine (`engine.py`) runs them forward and backward. Letters: B samples, N objects, I embedding width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.data.cache import TrainingCache
from sgg_fast.diffusion import losses, noise
from sgg_fast.graph import SceneGraphBatch
from sgg_fast.nn.clip import embed_images
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.mae import MaskedObjectDecoder, Places


@dataclasses.dataclass(frozen=True)
class Terms:
    """The loss of a step and its parts, each with the value that chance reaches."""

    total: torch.Tensor
    """Scalar with gradient."""
    values: dict[str, torch.Tensor]
    """Detached scalars by name, "loss" first."""
    chance: dict[str, torch.Tensor]
    """What each of them is at chance."""


def _terms(total: torch.Tensor, parts: dict[str, tuple[torch.Tensor, torch.Tensor | float]], chance: object) -> Terms:
    parts = {"loss": (total, chance), **parts}  # type: ignore[dict-item]
    return Terms(
        total=total,
        values={name: value.detach().float() for name, (value, _) in parts.items()},
        chance={name: c if isinstance(c, torch.Tensor) else total.new_full((), c) for name, (_, c) in parts.items()},
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A pre-training batch after eqs 3-8: B full copies, B masked ones, and perhaps padding."""

    batch: SceneGraphBatch
    masked: torch.Tensor
    """[N] bool, objects that the encoder did not see."""
    x: torch.Tensor
    """[N, D] objects."""
    x_global: torch.Tensor
    """[2B or 2B + 1, I]."""
    num: int
    """B."""


class PretrainStage(nn.Module):
    """L_pretrain = L_mae + L_con: masked auto-encoder and spatial constraint (eq. 9)."""

    def __init__(self, config: Config, conditioner: SceneGraphConditioner, cache: TrainingCache) -> None:
        super().__init__()
        self.config, self.cache = config, cache
        self.conditioner = conditioner
        name_dim, image_dim = cache.names.shape[1], cache.images.shape[1]
        self.decoder = MaskedObjectDecoder(config.width, name_dim, image_dim)
        self.constraint = losses.SpatialConstraint(config.contrastive)
        # Frozen inputs in the form the losses read them; tuples keep them out of the state dict.
        names = conditioner.standardise(cache.names)
        self._frozen = (names, conditioner.targets(names), conditioner.centre_images(cache.images))

    def forward(self, ids: np.ndarray, step: int, bucket: tuple[int, int] | None = None) -> Terms:
        """Terms of the samples `ids` [B] at `step`; with `bucket`, padded to (N, E), which changes none of them."""
        sample_B = torch.from_numpy(ids).to(self._frozen[0].device)
        return self.terms(self.encode(ids, step, bucket), sample_B, step)

    def encode(self, ids: np.ndarray, step: int, bucket: tuple[int, int] | None = None) -> Encoded:
        """Full and masked copies in one batch: L_con reads the full one, L_mae the masked one and its own X_global."""
        mask = ops.MaskDraw(len(ids), self.config.mask_ratio, self.config.seed, step)
        packed = ops.pack_masked(self.cache.graphs, np.concatenate([ids, ids]), mask, bucket=bucket)
        return self.encode_packed(*packed, len(ids))

    def encode_packed(self, batch: SceneGraphBatch, masked_N: torch.Tensor, num: int) -> Encoded:
        """`num` full copies, as many masked ones, and perhaps padding."""
        x_ND, _, x_global = self.conditioner.encode(self._frozen[0], batch, masked_N)
        return Encoded(batch, masked_N, x_ND, x_global, num)

    def decode(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predicted targets [B, L, K] of the masked copies' objects, their true names [B, L], and which are masked."""
        batch, num = encoded.batch, encoded.num
        longest = int(batch.sizes[num : 2 * num, 0].max())
        places = Places.of(batch.object_graph - num, batch.object_ptr[num : 2 * num + 1], longest)
        predicted = self.decoder(places.rows(encoded.x), encoded.x_global[num : 2 * num], places.present)
        return predicted, places.rows(batch.object_name), places.rows(encoded.masked)

    def terms(self, encoded: Encoded, sample_B: torch.Tensor, step: int | torch.Tensor) -> Terms:
        """Both losses. The shapes follow from those of the batch alone, so that a step can be replayed."""
        _, targets, images = self._frozen
        predicted, name_BL, masked_BL = self.decode(encoded)
        mae = losses.masked_mse(predicted, targets[name_BL], masked_BL)

        num_negatives = self.config.num_negatives if self.config.contrastive == "infonce" else 1

        def draw(rows: slice) -> torch.Tensor:
            return noise.draw_negatives(self.config.seed, step, sample_B[rows], num_negatives, len(self.cache))

        negatives = losses.Negatives(images, draw, num_negatives)
        con = self.constraint(encoded.x_global[: encoded.num], images[sample_B], negatives)
        con_chance = self.constraint.chance(num_negatives)
        mae_chance = masked_BL.any().float()  # a batch of one-object graphs masks nothing and scores 0
        return _terms(mae + con, {"mae": (mae, mae_chance), "con": (con, con_chance)}, mae_chance + con_chance)


class FinetuneStage(nn.Module):
    """L = lambda L_diff + (1 - lambda) L_ISA (eqs 10-12) through the UNet and the graph modules."""

    def __init__(
        self, config: Config, conditioner: SceneGraphConditioner, foundation: Foundation, cache: TrainingCache
    ) -> None:
        super().__init__()
        self.config, self.cache = config, cache
        self.unet = foundation.unet.requires_grad_(True).train()
        self.conditioner = conditioner.requires_grad_(True)
        self.conditioner.relation_encoder.mask_token.requires_grad_(False)  # only pre-training reads it
        names = conditioner.standardise(cache.names)
        alpha_bar = foundation.scheduler.alphas_cumprod.to(names.device)
        # A tuple keeps the frozen models out of the parameters and the state dict.
        self._frozen = (names, conditioner.centre_images(cache.images), alpha_bar, foundation)

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Terms of the samples `ids` [B] at `step`."""
        sample_B = torch.from_numpy(ids).to(self._frozen[0].device)
        return self.terms(ops.pack(self.cache.graphs, ids), sample_B, step)

    def terms(self, batch: SceneGraphBatch, sample_B: torch.Tensor, step: int | torch.Tensor) -> Terms:
        """The losses of samples whose graphs are `batch`."""
        names, images, alpha_bar, foundation = self._frozen
        config, latent_shape = self.config, self.cache.latent_shape
        key = (config.seed, step, sample_B)
        z_0 = self.cache.latents(sample_B, ops.hash_normal(latent_shape, *key, noise.STREAM_POSTERIOR))
        z_0 = z_0 * foundation.vae.config.scaling_factor
        eps = ops.hash_normal(latent_shape, *key, noise.STREAM_NOISE)
        t_B = noise.draw_timesteps(*key, len(alpha_bar))
        kept_B = ~noise.draw_dropped(*key, config.condition_dropout)
        abar_B, kind = alpha_bar[t_B], foundation.scheduler.config.prediction_type

        condition = self.conditioner(names, batch, self.cache.phrases)
        given = self.conditioner.drop(condition, ~kept_B)
        z_t = noise.add_noise(z_0, eps, abar_B)
        dtype = self.unet.dtype
        predicted = self.unet(z_t.to(dtype), t_B, given.context.to(dtype), encoder_attention_mask=given.mask).sample
        diff_chance_B = losses.min_snr_weight(kind, abar_B, config.min_snr_gamma)
        diff_B = diff_chance_B * losses.diffusion_loss(predicted, noise.target_of(kind, z_0, eps, abar_B))

        weight_B = losses.alignment_weight(abar_B, config.alignment_weight)
        shrink_B = abar_B.sqrt() if config.image_embedding == "noised" else 1.0
        isa_B = weight_B * losses.alignment_loss(images[sample_B], condition.x_global, shrink_B)
        isa_chance_B = weight_B
        if config.image_embedding == "predicted":
            isa_B = isa_B + weight_B * self._predicted_alignment(predicted, z_t, abar_B, kind, condition.x_global)
            isa_chance_B = 2 * weight_B
        total = losses.total_loss(diff_B, isa_B, kept_B, config.loss_weight)
        chance = losses.total_loss(diff_chance_B, isa_chance_B, kept_B, config.loss_weight)
        isa, isa_chance = (isa_B * kept_B).mean(), (isa_chance_B * kept_B).mean()
        return _terms(total, {"diff": (diff_B.mean(), diff_chance_B.mean()), "isa": (isa, isa_chance)}, chance)

    def _predicted_alignment(
        self, predicted: torch.Tensor, z_t: torch.Tensor, abar_B: torch.Tensor, kind: str, x_global: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's branch of --image-embedding predicted: CLIP of the decoded z_0 against X_global detached, [B]."""
        foundation = self._frozen[3]
        z_0 = noise.predicted_z0(kind, predicted.float(), z_t, abar_B)
        vae = foundation.vae
        pixels = vae.decode((z_0 / vae.config.scaling_factor).to(vae.dtype)).sample
        image_BI = self.conditioner.centre_images(embed_images(foundation.clip, pixels))
        return losses.alignment_loss(image_BI, x_global.detach())
