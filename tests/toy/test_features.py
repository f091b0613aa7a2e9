"""The toy's features: what they tell apart, what they are trained to tell, and how they train."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgg_fast.toy import world
from sgg_fast.toy.detector import CATEGORIES, draw_targets
from sgg_fast.toy.features import ToyFeatures, _cells, load_features, train_features


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.draw_scene(77, index) for index in range(24)]


def test_features_tell_scenes_from_noise(scenes):
    network = load_features()
    images = np.stack([scene.image for scene in scenes])
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    real, other, noisy = network.read(images[:12]), network.read(images[12:]), network.read(noise[:12])
    assert real.shape == (12, 64)
    assert np.linalg.norm(real.mean(0) - noisy.mean(0)) > 5 * np.linalg.norm(real.mean(0) - other.mean(0))


def test_the_head_names_categories_that_are_there(scenes):
    """Of a scene its own are mostly likelier than the others; probabilities by hand from the head's weights."""
    network = load_features()
    features = network.read(np.stack([scene.image for scene in scenes]))
    p = network.classify(features)
    logits = features @ network.head.weight[:, :, 0, 0].double().numpy().T + network.head.bias.double().numpy()
    np.testing.assert_allclose(p, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-9)
    wins = []
    for scene, own in zip(scenes, p, strict=True):
        names = {name.split()[-1] for name in scene.graph.objects}
        there = np.array([category in names for category in CATEGORIES])
        wins.append(np.mean(own[there][:, None] > own[~there][None]))
    assert np.mean(wins) > 0.8


def test_a_cell_has_the_categories_of_its_pixels():
    targets = draw_targets(77, 3)
    cells = _cells(targets, np.array([2, 0]))
    assert cells.shape == (2, len(CATEGORIES), 4, 4)
    for own, chosen in zip(cells, (2, 0), strict=True):
        for row, column in np.ndindex(4, 4):
            shown = targets.category[chosen][16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert set(own[:, row, column].nonzero().flatten().tolist()) == set(shown.flatten().tolist())


@pytest.mark.usefixtures("few_scenes")
def test_training_learns_the_cells_and_keeps_its_log(tmp_path):
    network = train_features(tmp_path, 12, 8)
    targets, chosen = draw_targets(world.TRAIN_SEED, 8), np.arange(8)

    def loss(network: ToyFeatures) -> float:
        pixels = torch.from_numpy(targets.images).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            logits = network.head(network(pixels))
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, _cells(targets, chosen)))

    torch.manual_seed(1)
    assert loss(network) < loss(ToyFeatures()) - 0.02, "the same first weights"
    kept = load_file(tmp_path / "features" / "checkpoint" / "ema.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
    assert "cells: precision" in (tmp_path / "features" / "log.txt").read_text()
