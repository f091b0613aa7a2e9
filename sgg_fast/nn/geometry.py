"""Auxiliary head that predicts the relative box geometry of a relation from the relation's token; training only.

It is the only loss that ties a predicate to positions in the picture. The head is dropped after training, so inference
needs no boxes. The image node's box is the whole picture, so the token of an object's relation to the image predicts
the object's position; the encoder must bring the rest of the graph's information about the object into this token.
Letters: N objects and E relations of a batch, S samples of the set, B of the batch, C token width, K = 2 kinds of
relations: to the image node, and between objects.
"""

from __future__ import annotations

import torch
from torch import nn

from sgg_fast.graph import SceneGraphBatch

LEAST_SIDE = 1e-3
"""Smallest side of a box in picture units; a smaller box lies outside the picture, and its pairs do not count."""


class PairGeometry(nn.Module):
    """Tokens of relations -> (dx, dy, log width ratio, log height ratio) of their boxes, object minus subject.

    Each of the four has mean 0 and variance 1 over the set's relations of one kind. The loss is their mean smooth L1.
    """

    def __init__(self, token_dim: int, width: int, store: SceneGraphBatch, boxes_N4: torch.Tensor) -> None:
        """boxes: x0, y0, x1, y1 in picture units of every object of `store`, which holds the set's graphs."""
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, width), nn.GELU(), nn.Linear(width, 4))
        low_N2, high_N2 = boxes_N4.float().chunk(2, dim=1)
        side_N2 = high_N2 - low_N2
        place_N4 = torch.cat([(low_N2 + high_N2) / 2, side_N2.clamp(min=LEAST_SIDE).log()], dim=1)
        seen_N = (side_N2 >= LEAST_SIDE).all(dim=1)
        difference_E4 = place_N4[store.object] - place_N4[store.subject]
        seen_E = seen_N[store.object] & seen_N[store.subject]
        found = [_statistics(difference_E4, seen_E & (store.relation_pooled == kind)) for kind in (0, 1)]
        mean_K4, std_K4, chance_K = (torch.stack(each) for each in zip(*found, strict=True))
        # The tuple keeps frozen tensors out of the state dict.
        self._frozen = (place_N4, seen_N, mean_K4, std_K4, chance_K, store.object_ptr)

    def targets(self, batch: SceneGraphBatch, sample_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([E, 4] targets, [E] bool: counted) of a batch that begins with the graphs of the samples `sample` [B].

        Relations of later graphs do not count.
        """
        place_N4, seen_N, mean_K4, std_K4, _, store_ptr = self._frozen
        own_E, _, shift_E = set_rows(batch, sample_B, store_ptr)
        subject_E, object_E = ((ends + shift_E) * own_E for ends in (batch.subject, batch.object))
        kind_E = batch.relation_pooled.long()
        target_E4 = (place_N4[object_E] - place_N4[subject_E] - mean_K4[kind_E]) / std_K4[kind_E]
        return target_E4, own_E & seen_N[subject_E] & seen_N[object_E]

    def forward(
        self, tokens_EC: torch.Tensor, batch: SceneGraphBatch, sample_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, loss of the best constants): means over the samples of the mean over their counted relations."""
        target_E4, counts_E = self.targets(batch, sample_B)
        loss_E = nn.functional.smooth_l1_loss(self.head(tokens_EC).float(), target_E4, reduction="none").mean(dim=1)
        share_E = sample_shares(counts_E, batch, len(sample_B))
        return (loss_E * share_E).sum(), (self._frozen[4][batch.relation_pooled.long()] * share_E).sum()


def set_rows(
    batch: SceneGraphBatch, sample_B: torch.Tensor, store_ptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Position in the set of the relations of a batch that begins with the graphs of the samples `sample`; each [E].

    Returns (bool: belongs to one of these graphs, index of the graph, offset from object rows of the batch to object
    rows of the set). store_ptr: the set's `object_ptr`.
    """
    num = len(sample_B)
    graph_E = batch.relation_graph.long().clamp(max=num - 1)
    return batch.relation_graph < num, graph_E, (store_ptr[sample_B] - batch.object_ptr[:num])[graph_E]


def sample_shares(counts_E: torch.Tensor, batch: SceneGraphBatch, num: int) -> torch.Tensor:
    """[E] weight of each relation in the mean over the first `num` graphs of the mean over their counted relations.

    A graph without counted relations adds 0, so the value of a batch is the mean of the values of its parts.
    """
    so_far = nn.functional.pad(counts_E.long().cumsum(0), (1, 0))[batch.relation_ptr.long()]
    return counts_E / (so_far.diff()[batch.relation_graph.long()].clamp(min=1) * num)


def _statistics(difference_E4: torch.Tensor, counts_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [4] and standard deviation [4] of the counted relations, and the loss of the best constants."""
    weight_E1 = counts_E.float()[:, None]
    total = weight_E1.sum().clamp(min=1)
    mean_4 = (difference_E4 * weight_E1).sum(0) / total
    std_4 = ((difference_E4 - mean_4).square() * weight_E1).sum(0).div(total).sqrt().clamp(min=1e-6)
    return mean_4, std_4, _best_constant_loss((difference_E4 - mean_4) / std_4, weight_E1)


def _best_constant_loss(target_E4: torch.Tensor, weight_E1: torch.Tensor) -> torch.Tensor:
    """Least mean smooth L1 of a constant for each of the four. Bisection finds the zero of its monotone derivative."""
    low_4, high_4 = target_E4.amin(0), target_E4.amax(0)
    for _ in range(60):
        middle_4 = (low_4 + high_4) / 2
        rising_4 = ((middle_4 - target_E4).clamp(-1, 1) * weight_E1).sum(0) > 0
        low_4, high_4 = torch.where(rising_4, low_4, middle_4), torch.where(rising_4, middle_4, high_4)
    loss_E4 = nn.functional.smooth_l1_loss(high_4.expand_as(target_E4), target_E4, reduction="none")
    return (loss_E4 * weight_E1).sum() / (4 * weight_E1.sum().clamp(min=1))
