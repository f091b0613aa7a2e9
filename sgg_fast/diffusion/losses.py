"""The training objectives of SGG-IG (Wang et al., AAAI-25), each with its value at chance.

Chance is what the best prediction that ignores the input scores. Letters: B images, K negatives, I embedding width,
N objects.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import logsigmoid


def masked_mse(predicted_NK: torch.Tensor, target_NK: torch.Tensor, masked_N: torch.Tensor) -> torch.Tensor:
    """Mean squared error over masked objects; 0 if none is masked. Targets have unit variance: chance is 1."""
    per_object = (predicted_NK.float() - target_NK.float()).square().mean(dim=1)
    weight = masked_N.to(per_object.dtype)
    return (per_object * weight).sum() / weight.sum().clamp(min=1)


class SpatialConstraint(nn.Module):
    """L_con, eq. 9, with logit a <X_global, I> + b.

    `form`: "bce" `-log s(f+) - log(1 - s(f-))`; "literal" `-log s(f+) - log s(1 - f-)` as printed; "infonce"
    `-log softmax` of the positive among K negatives. X_global is brought to unit norm; image embeddings are.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x_global_BI: torch.Tensor, positive_BI: torch.Tensor, negative_BKI: torch.Tensor) -> torch.Tensor:
        """Mean over the batch; "bce" and "literal" read the first negative only."""
        x = nn.functional.normalize(x_global_BI.float(), dim=-1)
        scale = self.scale.exp()
        positive_B = scale * (x * positive_BI).sum(-1) + self.bias
        negative_BK = scale * torch.einsum("bi,bki->bk", x, negative_BKI) + self.bias
        if self.form == "infonce":
            logits = torch.cat([positive_B[:, None], negative_BK], dim=1)
            return -logits.log_softmax(dim=1)[:, 0].mean()
        negative_B = negative_BK[:, 0]
        away = logsigmoid(-negative_B) if self.form == "bce" else logsigmoid(1 - negative_B)
        return -(logsigmoid(positive_B) + away).mean()

    def chance(self, num_negatives: int) -> float:
        """The lowest value that a constant logit reaches."""
        if self.form == "infonce":
            return math.log(num_negatives + 1)
        if self.form == "bce":
            return 2 * math.log(2)
        return 2 * math.log1p(math.exp(-0.5))  # both terms meet at f = 1/2


def diffusion_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_diff, eq. 11, per image [B]: mean squared error. Chance is 1 (predicting 0 for unit noise)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def alignment_weight(alpha_bar_B: torch.Tensor, form: str) -> torch.Tensor:
    """Weight of L_ISA at each image's timestep: "alpha_bar", or "none" (1)."""
    return alpha_bar_B if form == "alpha_bar" else torch.ones_like(alpha_bar_B)


def alignment_loss(
    image_BI: torch.Tensor, x_global_BI: torch.Tensor, shrink_B: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """L_ISA, eq. 10, per image [B]: `1 - shrink * cos(I(t), X_global)`. Chance is 1.

    `shrink` is sqrt(alpha_bar_t) for --image-embedding noised: the expectation of the cosine when I(t) carries noise.
    """
    return 1 - shrink_B * nn.functional.cosine_similarity(image_BI.float(), x_global_BI.float(), dim=-1)


def total_loss(
    diffusion_B: torch.Tensor, alignment_B: torch.Tensor, kept_B: torch.Tensor, weight: float
) -> torch.Tensor:
    """Eq. 12, `lambda L_diff + (1 - lambda) L_ISA`, mean over the batch; images whose condition was dropped (kept 0)

    skip the second term, which then counts as 0, so that the value does not depend on how images are batched.
    """
    return (weight * diffusion_B + (1 - weight) * alignment_B * kept_B.to(alignment_B.dtype)).mean()
