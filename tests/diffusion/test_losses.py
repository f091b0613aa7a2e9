"""Eqs 9-12 and the auto-encoder's error against scalar formulas; chance values; InfoNCE in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from support import loops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgg_fast.diffusion import losses, noise
from sgg_fast.diffusion.losses import min_snr_weight


def rows(num: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


# Auto-encoder.


def test_masked_mse_counts_masked_objects_only():
    predicted, target = rows(6, 3, 0), rows(6, 3, 1)
    masked = torch.tensor([True, False, True, False, False, True])
    squares = [float((predicted[i, k] - target[i, k]) ** 2) for i in (0, 2, 5) for k in range(3)]
    found = losses.masked_mse(predicted, target, masked)
    assert found.item() == pytest.approx(sum(squares) / 9, rel=1e-5)
    parts = [losses.masked_mse(predicted[k], target[k], masked[k], 3 / 2) for k in (slice(4), slice(4, 6))]
    assert (sum(parts) / 2).item() == pytest.approx(found.item(), rel=1e-6), "two parts of a batch, each by their mean"
    predicted[1] += 100.0
    assert losses.masked_mse(predicted, target, masked) == found


def test_masked_mse_of_nothing_masked_is_zero_with_zero_gradient():
    predicted = rows(2, 3, 0).requires_grad_()
    loss = losses.masked_mse(predicted, rows(2, 3, 1), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not predicted.grad.any()


def test_masked_mse_is_computed_in_fp32():
    a, b = rows(4, 64, 0).bfloat16(), rows(4, 64, 1).bfloat16()
    found = losses.masked_mse(a, b, torch.ones(4, dtype=torch.bool))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(float((a.double() - b.double()).square().mean()), rel=1e-6)


# Eq. 9.


def every(negative_BKI: torch.Tensor) -> losses.Negatives:
    """A table of all of them, and each its own."""
    num, k, _ = negative_BKI.shape
    index = torch.arange(num * k).view(num, k)
    return losses.Negatives(negative_BKI.reshape(num * k, -1), lambda rows: index[rows], k)


def scalar_contrast(form: str, x, positive, negatives, scale: float, bias: float) -> float:
    """Eq. 9 of one graph with plain floats."""
    f_pos = scale * loops.cosine(x, positive) + bias
    f_negs = [scale * loops.cosine(x, negative) + bias for negative in negatives]
    if form == "infonce":
        return math.log(math.exp(f_pos) + sum(math.exp(f) for f in f_negs)) - f_pos
    log_sigmoid_pos = math.log(1 / (1 + math.exp(-f_pos)))
    if form == "bce":
        return -log_sigmoid_pos - math.log(1 - 1 / (1 + math.exp(-f_negs[0])))
    return -log_sigmoid_pos - math.log(1 / (1 + math.exp(-(1 - f_negs[0]))))


@pytest.mark.parametrize("form", ["bce", "literal", "infonce"])
def test_spatial_constraint_against_scalars(form):
    x, positive, negative = rows(4, 5, 0), unit(rows(4, 5, 1)), unit(rows(12, 5, 2)).reshape(4, 3, 5)
    constraint = losses.SpatialConstraint(form)
    with torch.no_grad():
        constraint.scale.fill_(math.log(3.0))
        constraint.bias.fill_(-0.4)
    found = constraint(x, positive, every(negative))
    expected = [scalar_contrast(form, x[b], positive[b], negative[b], 3.0, -0.4) for b in range(4)]
    assert found.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


@pytest.mark.parametrize("form", ["bce", "literal", "infonce"])
def test_spatial_constraint_trains_scale_bias_and_x_global(form):
    x = rows(4, 5, 0).requires_grad_()
    constraint = losses.SpatialConstraint(form)
    constraint(x, unit(rows(4, 5, 1)), every(unit(rows(12, 5, 2)).reshape(4, 3, 5))).backward()
    assert x.grad.abs().sum() > 0 and constraint.scale.grad != 0
    # A softmax over logits does not see their common bias; the two sigmoids do.
    assert (constraint.bias.grad is None) == (form == "infonce")


@pytest.mark.parametrize("form", ["bce", "literal", "infonce"])
def test_spatial_constraint_falls_as_positive_and_negative_part(form):
    positive, negative = torch.eye(3)[:1], torch.eye(3)[1:2][None]
    constraint = losses.SpatialConstraint(form)
    towards, away = (constraint(x, positive, every(negative)) for x in (positive, negative[0]))
    assert towards < constraint.chance(1) < away


@pytest.mark.parametrize("form", ["bce", "literal", "infonce"])
def test_a_graph_negative_is_one_more_where_there_is_one(form):
    """Against scalars; the image of a graph that has none is pulled by nothing of it."""
    x, positive, negative = rows(4, 5, 0), unit(rows(4, 5, 1)), unit(rows(8, 5, 2)).reshape(4, 2, 5)
    wrong, counts = rows(4, 5, 3).requires_grad_(), torch.tensor([True, False, True, True])
    constraint = losses.SpatialConstraint(form)
    with torch.no_grad():
        constraint.bias.fill_(-0.4)
    scale = constraint.scale.exp().item()
    found = constraint(x, positive, every(negative), (wrong, counts))
    expected = 0.0
    for b in range(4):
        own = scalar_contrast(form, x[b], positive[b], negative[b], scale, -0.4)
        f_pos, f = (scale * loops.cosine(a, positive[b]) - 0.4 for a in (x[b], wrong[b].detach()))
        if counts[b]:
            more = loops.softplus(f - (form == "literal"))
            own = math.log(math.exp(own) + math.exp(f - f_pos)) if form == "infonce" else own + more
        expected += own / 4
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert wrong.grad.abs().sum(dim=1).gt(0).tolist() == counts.tolist()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", ["bce", "literal"])
def test_chance_is_the_best_constant_logit(form, share):
    grid = [i / 1000 - 10 for i in range(20_001)]
    away = {"bce": lambda f: loops.softplus(f), "literal": lambda f: loops.softplus(f - 1)}[form]
    best = min(loops.softplus(-f) + (1 + share) * away(f) for f in grid)
    constraint = losses.SpatialConstraint(form)
    assert constraint.chance(1, share) == pytest.approx(best, abs=1e-6)
    assert constraint.chance(1, torch.tensor(share)).item() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("num", [1, 7, 64])
def test_chance_of_infonce_is_the_loss_of_equal_logits(num):
    constraint = losses.SpatialConstraint("infonce")
    same = unit(rows(1, 5, 3))
    found = constraint(rows(2, 5, 0), same.expand(2, -1), every(same.expand(2, num, -1)))
    assert constraint.chance(num) == pytest.approx(found.item(), rel=1e-5)
    one_of_two = same.expand(2, -1), torch.tensor([True, False])
    x = same.expand(2, -1)
    found = constraint(x, x, every(same.expand(2, num, -1)), one_of_two)
    assert constraint.chance(num, 0.5) == pytest.approx(found.item(), rel=1e-5)


# Eqs 10-12.


def test_diffusion_loss_is_per_image_and_one_at_chance():
    predicted, target = rows(2, 24, 0).reshape(2, 2, 3, 4), rows(2, 24, 1).reshape(2, 2, 3, 4)
    found = losses.diffusion_loss(predicted, target)
    for b in range(2):
        pairs = zip(predicted[b].flatten().tolist(), target[b].flatten().tolist(), strict=True)
        assert found[b].item() == pytest.approx(sum((p - t) ** 2 for p, t in pairs) / 24, rel=1e-5)
    eps = rows(1, 40_000, 2).reshape(1, 4, 100, 100)
    assert losses.diffusion_loss(torch.zeros_like(eps), eps).item() == pytest.approx(1, abs=0.05)


def test_alignment_is_one_minus_cosine():
    image, x = rows(3, 5, 0), rows(3, 5, 1)
    found = losses.alignment_loss(image, x)
    for b in range(3):
        assert found[b].item() == pytest.approx(1 - loops.cosine(image[b], x[b]), rel=1e-5)
    torch.testing.assert_close(losses.alignment_loss(image, image), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.alignment_loss(image, -2 * image), torch.full((3,), 2.0))


def test_alignment_reads_low_precision_in_fp32():
    image, x = unit(rows(3, 512, 0)), rows(3, 512, 1).bfloat16()
    found = losses.alignment_loss(image, x)
    assert found.dtype == torch.float32
    for b in range(3):
        assert found[b].item() == pytest.approx(1 - loops.cosine(image[b], x[b]), abs=1e-6)


@pytest.mark.parametrize("abar", [0.95, 0.5, 0.05])
def test_shrunk_alignment_is_the_expectation_under_noise(abar):
    """`noised`: I(t) = sqrt(abar) I + sqrt(1 - abar) n with n of variance 1/512 keeps |I(t)| at 1."""
    width = 512
    image, x = unit(rows(1, width, 0)), unit(rows(1, width, 1) + 20 * unit(rows(1, width, 0)))
    noisy = abar**0.5 * image + (1 - abar) ** 0.5 * rows(4000, width, 2) / width**0.5
    drawn = 1 - torch.nn.functional.cosine_similarity(noisy, x.expand_as(noisy), dim=1)
    found = losses.alignment_loss(image, x, torch.tensor([abar]).sqrt())
    assert found.item() == pytest.approx(drawn.mean().item(), abs=5e-3)


def test_alignment_weight_is_alpha_bar_or_one():
    abar = torch.tensor([0.9, 0.01])
    assert torch.equal(losses.alignment_weight(abar, "alpha_bar"), abar)
    assert torch.equal(losses.alignment_weight(abar, "none"), torch.ones(2))


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 1.0])
def test_total_is_eq_12_and_dropped_images_skip_alignment(weight):
    diffusion, alignment = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 7.0, 0.25])
    kept = torch.tensor([True, False, True])
    found = losses.total_loss(diffusion, alignment, kept, weight).item()
    per_image = [weight * 1.0 + (1 - weight) * 0.5, weight * 2.0, weight * 3.0 + (1 - weight) * 0.25]
    assert found == pytest.approx(sum(per_image) / 3, rel=1e-6)


@pytest.mark.parametrize(("kind", "extra"), [("epsilon", 0), ("v_prediction", 1)])
def test_the_weight_by_hand(kind, extra):
    alpha_bar = [0.9999, 0.95, 0.5, 0.01]
    got = min_snr_weight(kind, torch.tensor(alpha_bar, dtype=torch.float64), 5.0).tolist()
    for weight, a in zip(got, alpha_bar, strict=True):
        snr = a / (1 - a)
        assert weight == pytest.approx(min(snr, 5.0) / (snr + extra))
    assert min_snr_weight(kind, torch.tensor(alpha_bar), 0.0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("kind", "at_0"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_the_weight_at_both_ends_of_a_schedule_is_its_limit(kind, at_0):
    """abar = 0: zero terminal SNR (Lin et al., 2024); abar = 1: no noise."""
    assert min_snr_weight(kind, torch.tensor([0.0, 1.0]), 5.0).tolist() == [at_0, 0.0]
    near = min_snr_weight(kind, torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64), 5.0).tolist()
    assert near == pytest.approx([at_0, 0.0], abs=1e-9)


# InfoNCE in chunks.

WIDTH = 16


def units(num: int, seed: int) -> torch.Tensor:
    return unit(rows(num, WIDTH, seed))


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
    negatives = drawn(batch, num, units(40, 1).double())
    positive = units(batch, 2).double()
    found, expected = [], []
    for grads, form in ((found, "chunked"), (expected, "plain")):
        constraint = losses.SpatialConstraint("infonce").double()
        x = (3 * units(batch, 3).double()).requires_grad_()
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
    negatives, scale = drawn(3, 4, units(9, 1).double()), torch.tensor(2.0).double().requires_grad_()
    x, positive = units(3, 2).double().requires_grad_(), torch.randn(3).double().requires_grad_()
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
    negatives, positive = drawn(batch, num, table), units(batch, 2)
    constraint, x, kept = losses.SpatialConstraint("infonce"), units(batch, 3).requires_grad_(), []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        loss = constraint(x, positive, negatives) if chunked else plain(x, positive, constraint.scale, negatives)
        loss.backward()
    return sum(kept), largest.numel


def test_memory_does_not_grow_with_batch_times_negatives(monkeypatch):
    """Batch 256 with 512 negatives: nothing of [B, K] is kept or ever made, where the plain form keeps [B, K, I]."""
    batch, num, table = 256, 512, units(600, 1)
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
    for num in (1, 3, 1000):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", num * 6 * WIDTH)
        x = units(7, 3).requires_grad_()
        losses.SpatialConstraint("infonce")(x, units(7, 2), drawn(7, 6, units(20, 1))).backward()
        grads.append(x.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-5, atol=1e-7)
