"""How the boxes of a relation's pair lie to each other, predicted from the relation's token; in training only.

Nothing else asks what a predicate means in the picture; inference stays free of layouts, for the head is thrown away.
The image node's box is the whole picture, so an object's own token, that of its relation to the image, is asked where
in the picture the object lies: what the rest of the graph tells about it has to arrive there.
Letters: N objects and E relations of a batch, S samples of the set, B of the batch, C token width, K = 2 kinds of
relations: to the image node, and between objects.
"""

from __future__ import annotations

import torch
from torch import nn

from sgg_fast.graph import SceneGraphBatch

LEAST_SIDE = 1e-3
"""Of a box, in picture units; a smaller one lies outside the picture, and its pairs do not count."""


class PairGeometry(nn.Module):
    """Tokens of relations -> (dx, dy, log of the ratio of widths, of heights), object minus subject, of their boxes.

    Each of the four has mean 0 and variance 1 over the set's relations of a kind. Smooth L1, mean of the four.
    """

    def __init__(self, token_dim: int, width: int, store: SceneGraphBatch, boxes_N4: torch.Tensor) -> None:
        """boxes: x0, y0, x1, y1 in picture units of every object of `store`, the set's graphs."""
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
        # A tuple keeps what is frozen out of the state dict.
        self._frozen = (place_N4, seen_N, mean_K4, std_K4, chance_K, store.object_ptr)

    def targets(self, batch: SceneGraphBatch, sample_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([E, 4] targets, [E] bool which count) of a batch that begins with the graphs of the samples `sample` [B].

        Relations of what follows those graphs do not count.
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
        """Mean over the samples of that over their relations that count, and what the best constants score."""
        target_E4, counts_E = self.targets(batch, sample_B)
        loss_E = nn.functional.smooth_l1_loss(self.head(tokens_EC).float(), target_E4, reduction="none").mean(dim=1)
        share_E = sample_shares(counts_E, batch, len(sample_B))
        return (loss_E * share_E).sum(), (self._frozen[4][batch.relation_pooled.long()] * share_E).sum()


def set_rows(
    batch: SceneGraphBatch, sample_B: torch.Tensor, store_ptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the relations of a batch that begins with the graphs of the samples `sample` belong in the set, each [E].

    Bool, whether it is of one of those graphs; which; how far its objects' rows in the set lie behind those in the
    batch. store_ptr: the set's `object_ptr`.
    """
    num = len(sample_B)
    graph_E = batch.relation_graph.long().clamp(max=num - 1)
    return batch.relation_graph < num, graph_E, (store_ptr[sample_B] - batch.object_ptr[:num])[graph_E]


def sample_shares(counts_E: torch.Tensor, batch: SceneGraphBatch, num: int) -> torch.Tensor:
    """[E] share of each relation in a mean over the first `num` graphs of the mean over their relations that count.

    A graph without any adds nothing to that mean; so a batch in parts has the mean of the parts' means.
    """
    so_far = nn.functional.pad(counts_E.long().cumsum(0), (1, 0))[batch.relation_ptr.long()]
    return counts_E / (so_far.diff()[batch.relation_graph.long()].clamp(min=1) * num)


def _statistics(difference_E4: torch.Tensor, counts_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [4] and standard deviation [4] of the relations that count, and the loss of the best constants."""
    weight_E1 = counts_E.float()[:, None]
    total = weight_E1.sum().clamp(min=1)
    mean_4 = (difference_E4 * weight_E1).sum(0) / total
    std_4 = ((difference_E4 - mean_4).square() * weight_E1).sum(0).div(total).sqrt().clamp(min=1e-6)
    return mean_4, std_4, _best_constant_loss((difference_E4 - mean_4) / std_4, weight_E1)


def _best_constant_loss(target_E4: torch.Tensor, weight_E1: torch.Tensor) -> torch.Tensor:
    """Least mean smooth L1 of a constant for each of the four: its derivative grows, so halving finds its zero."""
    low_4, high_4 = target_E4.amin(0), target_E4.amax(0)
    for _ in range(60):
        middle_4 = (low_4 + high_4) / 2
        rising_4 = ((middle_4 - target_E4).clamp(-1, 1) * weight_E1).sum(0) > 0
        low_4, high_4 = torch.where(rising_4, low_4, middle_4), torch.where(rising_4, middle_4, high_4)
    loss_E4 = nn.functional.smooth_l1_loss(high_4.expand_as(target_E4), target_E4, reduction="none")
    return (loss_E4 * weight_E1).sum() / (4 * weight_E1.sum().clamp(min=1))
