"""The training loop of the toy's parts: its rate, its moving average, and how it goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgg_fast.toy.fit import fit, learning_rate, save_half


def test_the_rate_stays_then_falls():
    rates = [learning_rate(step, 1000, 1.0, constant_until=0.7) for step in (0, 99, 100, 699, 850, 999)]
    assert rates[0] == 0.01 and rates[1:4] == [1.0] * 3 and 0.4 < rates[4] < 0.6 and rates[5] < 0.02
    assert learning_rate(300, 1000, 1.0, constant_until=0.7, first=300) == 0.01, "warm-up again, without a checkpoint"
    assert learning_rate(500, 1000, 1.0) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * 400 / 900)))


def loss_of(model: torch.nn.Module):
    """A batch of its own each step, and noise from torch's generator, as the parts draw it."""

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.from_numpy(np.random.default_rng(step).normal(size=(4, 3))).float()
        value = (model(x) - torch.randn(4, 2)).square().mean()
        return value, {"loss": float(value.detach())}

    return loss


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    """From its checkpoint alone: the model that goes on begins with other weights."""
    made = [torch.nn.Linear(3, 2) for _ in range(2)]
    with torch.no_grad():
        for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
            b.copy_(a)
    whole = fit("whole", made[0], loss_of(made[0]), tmp_path / "whole", 6, peak_lr=1e-2)
    for num_steps, model in ((3, made[1]), (6, torch.nn.Linear(3, 2))):
        parts = fit("parts", model, loss_of(model), tmp_path / "parts", num_steps, peak_lr=1e-2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])
    for file in ("weights.safetensors", "ema.safetensors"):
        a, b = (load_file(tmp_path / run / "checkpoint" / file) for run in ("whole", "parts"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["checkpoint"], "and nothing half written"


def test_what_returns_is_the_moving_average_and_it_is_looked_at(tmp_path):
    """The average by hand, from the weights before each step."""
    model, seen, looked = torch.nn.Linear(3, 2), [], []
    own = loss_of(model)

    def noted(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(model.weight.detach().clone())
        return own(step)

    def look(ema: torch.nn.Module, step: int) -> str:
        looked.append((step, ema.weight.clone()))
        return f"looked at {step}"

    arguments = {"peak_lr": 1e-2, "ema_decay": 0.3, "look": look, "look_every": 2}
    average = fit("part", model, noted, tmp_path / "part", 5, **arguments)
    expected = seen[0]
    for step, weight in enumerate([*seen[1:], model.weight.detach()]):
        decay = min(0.3, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.weight, expected)
    assert not average.weight.requires_grad and not torch.equal(average.weight, model.weight)
    assert [step for step, _ in looked] == [2, 4, 5] and torch.equal(looked[-1][1], average.weight)
    said = (tmp_path / "part" / "log.txt").read_text().splitlines()
    assert [line.partition(": ")[2] for line in said] == ["looked at 2", "looked at 4", "looked at 5"]


def test_half_precision_is_of_numbers_and_not_of_counts(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    save_half(model, tmp_path / "part.safetensors")
    held = load_file(tmp_path / "part.safetensors")
    assert held.keys() == model.state_dict().keys() and held["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(held["0.weight"], model[0].weight.half())
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]
