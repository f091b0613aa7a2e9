"""The latent reader: what it depends on, and that frozen it passes gradients on and keeps its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgg_fast.nn.latent_reader import LatentReader, frozen


def reader() -> LatentReader:
    torch.manual_seed(0)
    return LatentReader(4, 12)


@torch.no_grad()
def test_a_prediction_is_read_by_its_shape_not_by_its_size():
    """Predictions grow without bound as alpha_bar falls; the time is read beside them."""
    model, z, t = reader(), torch.randn(3, 4, 16, 24), torch.tensor([10, 500, 990])
    found = model(z, t)
    assert found.shape == (3, 12) and found.dtype == torch.float32
    large, larger = model(1e4 * z, t), model(1e6 * z, t)
    torch.testing.assert_close(large, larger, rtol=1e-2, atol=1e-3)
    assert (large - model(-1e4 * z, t)).abs().max() > 0.01
    assert (found - model(z, t.flip(0))).abs().amax(dim=1)[[0, 2]].min() > 1e-3
    for b in range(3):
        torch.testing.assert_close(model(z[b : b + 1], t[b : b + 1])[0], found[b], rtol=1e-4, atol=1e-5)
    half = model.bfloat16()(z, t)
    assert half.dtype == torch.bfloat16 and (half - found).norm() < 0.05 * found.norm()


def test_it_learns_to_read_the_mean_of_a_latent():
    model, draw = reader(), torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.Adam(model.parameters(), 2e-3), []
    for _ in range(40):
        mean = torch.randn(16, 4, 1, 1, generator=draw)
        z = mean + 0.1 * torch.randn(16, 4, 8, 8, generator=draw)
        found = model(z, torch.full((16,), 100))[:, :4]
        losses.append((found - nn.functional.normalize(mean.flatten(1), dim=1)).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_a_frozen_module_passes_gradients_on_and_trains_again_afterwards():
    model, z = reader(), torch.randn(1, 4, 8, 8, requires_grad=True)
    model.conv_in.bias.requires_grad_(False)
    with frozen(model):
        model(z, torch.tensor([3])).sum().backward()
    assert z.grad.any() and all(p.grad is None for p in model.parameters())
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv_in.bias"]
    model(z, torch.tensor([3])).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
