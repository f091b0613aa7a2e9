"""InfoNCE in chunks: the plain formula's value and gradients; memory does not grow with batch times negatives."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgg_fast.diffusion import losses, noise

WIDTH = 16


def unit(num: int, seed: int) -> torch.Tensor:
    rows = torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def drawn(batch: int, num: int, table: torch.Tensor) -> losses.Negatives:
    sample_B = torch.arange(batch)
    return losses.Negatives(table, lambda rows: noise.draw_negatives(3, 5, sample_B[rows], num, len(table)), num)


def plain(
    x: torch.Tensor, positive: torch.Tensor, log_scale: torch.Tensor, negatives: losses.Negatives
) -> torch.Tensor:
    """All logits at once, by the definition."""
    every = negatives.table[negatives.draw(slice(None))]
    x = torch.nn.functional.normalize(x, dim=-1)
    logits = log_scale.exp() * torch.cat([(x * positive).sum(-1, keepdim=True), (x[:, None] * every).sum(-1)], dim=1)
    return -torch.log(logits.softmax(dim=1)[:, 0]).mean()


@pytest.mark.parametrize("chunk", [1, 3 * 7 * WIDTH, 10**9])
@pytest.mark.parametrize(("batch", "num"), [(1, 1), (5, 7), (11, 7)])
def test_value_and_gradients_are_the_plain_formulas(batch, num, chunk, monkeypatch):
    """In float64, one row a chunk, three rows, or all at once."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    negatives = drawn(batch, num, unit(40, 1).double())
    positive = unit(batch, 2).double()
    found, expected = [], []
    for grads, form in ((found, "chunked"), (expected, "plain")):
        constraint = losses.SpatialConstraint("infonce").double()
        x = (3 * unit(batch, 3).double()).requires_grad_()
        if form == "chunked":
            monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # keep float64
            loss = 1.7 * constraint(x, positive, negatives)
            monkeypatch.undo()
            monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
        else:
            loss = 1.7 * plain(x, positive, constraint.scale, negatives)
        loss.backward()
        grads += [loss.detach(), x.grad, constraint.scale.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    negatives, scale = drawn(3, 4, unit(9, 1).double()), torch.tensor(2.0).double().requires_grad_()
    x, positive = unit(3, 2).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: losses.info_nce(*args, negatives), (x, positive, scale))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def measured(batch: int, num: int, chunked: bool, table: torch.Tensor) -> tuple[int, int]:
    """(elements kept for backward, elements of the largest tensor in forward and backward)."""
    negatives, positive = drawn(batch, num, table), unit(batch, 2)
    constraint, x, kept = losses.SpatialConstraint("infonce"), unit(batch, 3).requires_grad_(), []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        loss = constraint(x, positive, negatives) if chunked else plain(x, positive, constraint.scale, negatives)
        loss.backward()
    return sum(kept), largest.numel


def test_memory_does_not_grow_with_batch_times_negatives(monkeypatch):
    """Batch 256 with 512 negatives: nothing of [B, K] is kept or ever made, where the plain form keeps [B, K, I]."""
    batch, num, table = 256, 512, unit(600, 1)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * num * WIDTH)
    kept, largest = measured(batch, num, True, table)
    assert kept < 8 * batch * WIDTH < batch * num
    assert largest <= 4 * num * WIDTH < batch * num
    twice, _ = measured(batch, 2 * num, True, table)
    assert twice == kept, "the number of negatives does not show"
    kept_plain, largest_plain = measured(batch, num, False, table)
    assert kept_plain > batch * num * WIDTH and largest_plain >= batch * num * WIDTH, "what is counted can be seen"


def test_chunks_do_not_change_a_bit_of_what_a_row_gets(monkeypatch):
    """Rows are independent: the gradient of x in chunks of one row and of three is the same to rounding."""
    grads = []
    for rows in (1, 3, 1000):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", rows * 6 * WIDTH)
        x = unit(7, 3).requires_grad_()
        losses.SpatialConstraint("infonce")(x, unit(7, 2), drawn(7, 6, unit(20, 1))).backward()
        grads.append(x.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-5, atol=1e-7)
