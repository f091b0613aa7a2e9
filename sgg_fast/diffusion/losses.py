"""The training objectives of SGG-IG (Wang et al., AAAI-25), each with its chance level.

Chance is the loss of the best prediction that ignores the input. Letters: B images, K negatives, I embedding width,
N objects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid


def masked_mse(
    predicted_NK: torch.Tensor, target_NK: torch.Tensor, masked_N: torch.Tensor, num: float | torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error over masked objects; 0 if none is masked. Targets have unit variance: chance is 1.

    N may be several dimensions. num: what the sum is divided by in place of the number of masked objects, for a part of
    a batch.
    """
    per_object = (predicted_NK.float() - target_NK.float()).square().mean(dim=-1)
    weight = masked_N.to(per_object.dtype)
    return (per_object * weight).sum() / (weight.sum().clamp(min=1) if num is None else num)


@dataclasses.dataclass(frozen=True)
class Negatives:
    """K images for each graph of a batch, drawn on request, so that they are never all in memory."""

    table: torch.Tensor
    """[M, I] unit embeddings of all images."""
    draw: Callable[[slice], torch.Tensor]
    """Rows of the batch -> [b, K] indices into the table, equal at every call."""
    num: int
    """K."""


CHUNK_ELEMENTS = 2**22
"""Elements of negatives that InfoNCE gathers at once: 16 MB in fp32, but at least one graph's negatives."""


class _InfoNCE(torch.autograd.Function):
    """InfoNCE in chunks. It saves [B] and [B, I] for backward, which draws and gathers the negatives again."""

    @staticmethod
    def _chunks(x_BI: torch.Tensor, negatives: Negatives) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Chunks: (rows, their negatives [b, K, I], the cosines [b, K])."""
        size = max(1, CHUNK_ELEMENTS // (negatives.num * x_BI.shape[1]))
        for first in range(0, len(x_BI), size):
            rows = slice(first, first + size)
            negative_bKI = negatives.table[negatives.draw(rows)]
            yield rows, negative_bKI, torch.einsum("bi,bki->bk", x_BI[rows], negative_bKI)

    @staticmethod
    def forward(
        ctx: Any, x_BI: torch.Tensor, positive_B: torch.Tensor, scale: torch.Tensor, negatives: Negatives
    ) -> torch.Tensor:
        lse_B = torch.empty_like(positive_B)
        for rows, _, cosine_bK in _InfoNCE._chunks(x_BI, negatives):
            lse_B[rows] = torch.logaddexp(positive_B[rows], (scale * cosine_bK).logsumexp(dim=1))
        ctx.save_for_backward(x_BI, positive_B, scale, lse_B)
        ctx.negatives = negatives
        return lse_B - positive_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BI, positive_B, scale, lse_B = ctx.saved_tensors
        grad_x, grad_scale = torch.empty_like(x_BI), torch.zeros_like(scale)
        for rows, negative_bKI, cosine_bK in _InfoNCE._chunks(x_BI, ctx.negatives):
            grad_bK = grad_B[rows, None] * (scale * cosine_bK - lse_B[rows, None]).exp()
            grad_x[rows] = scale * torch.einsum("bk,bki->bi", grad_bK, negative_bKI)
            grad_scale += (grad_bK * cosine_bK).sum()
        return grad_x, grad_B * ((positive_B - lse_B).exp() - 1), grad_scale, None


def info_nce(x_BI: torch.Tensor, positive_B: torch.Tensor, scale: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """InfoNCE per graph [B]: `-log softmax` of the positive logit [B] against `scale <x, negative>` of K negatives.

    x: [B, I]. Source: van den Oord et al., 2018, eq. 4. Logits [B, K] and negatives [B, K, I] exist only in chunks.
    """
    return _InfoNCE.apply(x_BI, positive_B, scale, negatives)


class SpatialConstraint(nn.Module):
    """L_con, eq. 9, with logit a <X_global, I> + b.

    `form`: "bce" `-log s(f+) - log(1 - s(f-))`; "literal" `-log s(f+) - log s(1 - f-)` as printed; "infonce"
    `-log softmax` of the positive among K negatives. X_global is normalised here; image embeddings have unit norm
    already. A graph negative (the image's own graph with an error) adds a negative term, or one more to the softmax.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        x_global_BI: torch.Tensor,
        positive_BI: torch.Tensor,
        negatives: Negatives,
        wrong: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Mean over the batch; "bce" and "literal" read the first negative only.

        wrong: X_global [B, I] of the graph negatives, and bool [B]: counted.
        """
        x, scale = nn.functional.normalize(x_global_BI.float(), dim=-1), self.scale.exp()
        positive_B, wrong_B = scale * (x * positive_BI).sum(-1), None
        if wrong is not None:
            wrong_B = scale * nn.functional.cosine_similarity(wrong[0].float(), positive_BI, dim=-1)
        if self.form == "infonce":  # a softmax cancels the common bias of the logits
            loss_B = info_nce(x, positive_B, scale, negatives)
            if wrong is not None and wrong_B is not None:
                wrong_B = (wrong_B - positive_B).masked_fill(~wrong[1], -torch.inf)
                loss_B = torch.logaddexp(loss_B, wrong_B)
            return loss_B.mean()
        first_BI = negatives.table[negatives.draw(slice(None))[:, 0]]
        away_B = self._away(scale * (x * first_BI).sum(-1))
        if wrong is not None and wrong_B is not None:
            away_B = away_B + self._away(wrong_B) * wrong[1].to(away_B.dtype)
        return (away_B - logsigmoid(positive_B + self.bias)).mean()

    def _away(self, negative_B: torch.Tensor) -> torch.Tensor:
        """The loss term of a negative pair, from its logit without the bias."""
        negative_B = negative_B + self.bias
        return -(logsigmoid(-negative_B) if self.form == "bce" else logsigmoid(1 - negative_B))

    def chance(self, num_negatives: int, share: float | torch.Tensor = 0.0) -> float | torch.Tensor:
        """The lowest loss of a constant logit; `share` of the batch has a graph negative."""
        if self.form == "infonce":
            return (1 - share) * math.log(num_negatives + 1) + share * math.log(num_negatives + 2)
        each = 1 + share  # negatives for each positive
        if self.form == "bce":  # at s(f) = 1 / (1 + each)
            return _log(1 + each) + each * _log(1 + 1 / each)
        # The zero of the derivative of -log s(f) - each log s(1 - f): a quadratic equation in e^f.
        odds = ((share**2 + 4 * math.e * each) ** 0.5 - share) / (2 * each)
        return _log(1 + 1 / odds) + each * _log(1 + odds / math.e)


def _log(x: float | torch.Tensor) -> float | torch.Tensor:
    return torch.log(x) if isinstance(x, torch.Tensor) else math.log(x)


def diffusion_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_diff, eq. 11, per image [B]: mean squared error. Chance is 1 (predicting 0 for unit noise)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def min_snr_weight(kind: str, alpha_bar_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of L_diff at each image's timestep [B]: min(SNR, gamma) / SNR for noise, / (SNR + 1) for v.

    SNR = abar / (1 - abar); gamma 0 gives 1. Source: Hang et al., 2023, Efficient Diffusion Training via Min-SNR
    Weighting.
    """
    if not gamma:
        return torch.ones_like(alpha_bar_B)
    snr_B = alpha_bar_B / (1 - alpha_bar_B)  # 0 at the last step of a schedule with zero terminal SNR
    if kind == "v_prediction":
        return snr_B.clamp(max=gamma) / (snr_B + 1)
    return (gamma / snr_B).clamp(max=1)


def alignment_weight(alpha_bar_B: torch.Tensor, form: str) -> torch.Tensor:
    """Weight of L_ISA at each image's timestep: "alpha_bar", or "none" (1)."""
    return alpha_bar_B if form == "alpha_bar" else torch.ones_like(alpha_bar_B)


def alignment_loss(
    image_BI: torch.Tensor, x_global_BI: torch.Tensor, shrink_B: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """L_ISA, eq. 10, per image [B]: `1 - shrink * cos(I(t), X_global)`. Chance is 1.

    `shrink` is sqrt(alpha_bar_t) for --image-embedding noised: the expected cosine when I(t) contains noise.
    """
    return 1 - shrink_B * nn.functional.cosine_similarity(image_BI.float(), x_global_BI.float(), dim=-1)


def total_loss(
    diffusion_B: torch.Tensor, alignment_B: torch.Tensor, kept_B: torch.Tensor, weight: float
) -> torch.Tensor:
    """Eq. 12, `lambda L_diff + (1 - lambda) L_ISA`, mean over the batch.

    The second term is 0 for images with a dropped condition (kept 0), so the value does not depend on the batching.
    """
    return (weight * diffusion_B + (1 - weight) * alignment_B * kept_B.to(alignment_B.dtype)).mean()
