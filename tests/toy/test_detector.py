"""The toy's detector: votes to instances, training targets, and what the shipped weights find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgg_fast.eval.detectors import ToyWorldDetector, open_detector
from sgg_fast.toy import world
from sgg_fast.toy.detector import (
    CATEGORIES,
    COLOURS,
    SPOKEN_KINDS,
    SPOKEN_WEIGHTS,
    UNNAMED,
    ToyDetector,
    accuracy,
    boxes_of,
    count_votes,
    draw_targets,
    generalised_iou,
    load_detector,
    loss_terms,
    train_detector,
)
from sgg_fast.toy.detector import _batch as draw_batch
from sgg_fast.toy.features import load_features


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.draw_scene(77, index) for index in range(24)]


def perfect_votes(scene: world.Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a detector without error would say of each pixel."""
    owner = scene.masks.argmax(axis=0)
    words = [name.split() for name in scene.graph.objects]
    category = np.array([CATEGORIES.index(w[-1]) for w in words])[owner]
    colour = np.array([COLOURS.index(w[0]) if len(w) > 1 else 0 for w in words])[owner]
    return (
        np.eye(len(CATEGORIES))[category].transpose(2, 0, 1),
        np.eye(len(COLOURS))[colour].transpose(2, 0, 1),
        scene.boxes[owner],
    )


def test_perfect_votes_give_back_every_thing_with_box_mask_and_colour(scenes):
    for scene in scenes:
        found = count_votes(*perfect_votes(scene))
        for name, box, mask in zip(scene.graph.objects, scene.boxes, scene.masks, strict=True):
            (one,) = [i for i in found if i.category == name.split()[-1] and np.allclose(i.box, box, atol=1e-6)]
            np.testing.assert_array_equal(one.mask, mask)
            assert " " not in name or one.colour == name.split()[0]
        assert len(found) == len(scene.graph.objects)


def test_two_of_a_kind_that_overlap_are_two():
    share = np.zeros((len(CATEGORIES), 64, 64))
    share[CATEGORIES.index("sky")] = 0.5
    share[CATEGORIES.index("sheep"), 20:40, 10:50] = 1.0
    boxes = np.broadcast_to(np.array([0.0, 0.0, 1.0, 1.0]), (64, 64, 4)).copy()
    boxes[20:40, 10:30] = [10 / 64, 20 / 64, 34 / 64, 40 / 64]  # the near one hides the far one's left side
    boxes[20:40, 30:50] = [28 / 64, 20 / 64, 50 / 64, 40 / 64]
    colour = np.zeros((len(COLOURS), 64, 64))
    found = [i for i in count_votes(share, colour, boxes) if i.category == "sheep"]
    assert sorted(float(i.box[0]) * 64 for i in found) == [10.0, 28.0]
    assert [int(i.mask.sum()) for i in found] == [400, 400]


def test_stray_and_unsure_pixels_are_no_thing():
    share = np.zeros((len(CATEGORIES), 64, 64))
    share[CATEGORIES.index("sky")] = 1.0
    share[:, 5, 5:8] = np.eye(len(CATEGORIES))[CATEGORIES.index("ball")][:, None]  # three pixels
    share[:, 30:40, 30:40] = 0.3 * np.eye(len(CATEGORIES))[CATEGORIES.index("dog")][:, None, None]
    boxes = np.broadcast_to(np.array([0.0, 0.0, 1.0, 1.0]), (64, 64, 4))
    found = count_votes(share, np.zeros((len(COLOURS), 64, 64)), boxes)
    assert [i.category for i in found] == ["sky"]


def test_targets_are_the_worlds_own(scenes):
    targets = draw_targets(77, 5)
    for n in range(5):
        scene = scenes[n]
        np.testing.assert_array_equal(targets.images[n], scene.image)
        for name, box, mask in zip(scene.graph.objects, scene.boxes, scene.masks, strict=True):
            words = name.split()
            assert set(targets.category[n][mask]) == {CATEGORIES.index(words[-1])}
            assert set(targets.colour[n][mask]) == {COLOURS.index(words[0]) if len(words) > 1 else UNNAMED}
            np.testing.assert_allclose(targets.boxes[n][mask], np.broadcast_to(box, (mask.sum(), 4)), atol=1e-3)
            np.testing.assert_allclose(targets.weight[n][mask], mask.sum() ** -0.5, rtol=1e-3)


def test_mirrored_batches_mirror_the_boxes():
    targets = draw_targets(77, 3)
    rng = np.random.default_rng(0)
    pixels, category, _, boxes, _ = draw_batch(targets, rng, 32)
    mirrored = 0
    for b in range(32):
        for n in range(3):
            for flip in (False, True):
                want = targets.category[n][:, ::-1] if flip else targets.category[n]
                if np.array_equal(category[b].numpy(), want):
                    own = targets.boxes[n].astype(np.float32)
                    own = (
                        np.stack([1 - own[:, ::-1, 2], own[..., ::-1, 1], 1 - own[:, ::-1, 0], own[:, ::-1, 3]], -1)
                        if flip
                        else own
                    )
                    np.testing.assert_allclose(boxes[b].permute(1, 2, 0).numpy(), own, atol=2e-3)
                    mirrored += flip
    assert 8 < mirrored < 24
    assert pixels.shape == (32, 3, 64, 64)


def test_sides_become_boxes_and_generalised_iou_is_the_papers():
    sides = torch.full((1, 4, 64, 64), 0.1)
    box = boxes_of(sides)[0, :, 10, 20]
    x, y = 20.5 / 64, 10.5 / 64
    torch.testing.assert_close(box, torch.tensor([x - 0.1, y - 0.1, x + 0.1, y + 0.1]))
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    torch.testing.assert_close(generalised_iou(a, b), torch.tensor([1 / 7 - 2 / 9]))
    apart = torch.tensor([[4.0, 0.0, 6.0, 2.0]])
    torch.testing.assert_close(generalised_iou(a, apart), torch.tensor([-4 / 12]))


def test_the_loss_falls_to_nothing_on_one_batch():
    """A few steps on two scenes: every term falls, so every head learns."""
    targets = draw_targets(77, 2)
    torch.manual_seed(0)
    detector = ToyDetector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    values = []
    for _ in range(10):
        terms = loss_terms(detector, draw_batch(targets, np.random.default_rng(0), 4))
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append({name: float(term.detach()) for name, term in terms.items()})
    for name, first in values[0].items():
        assert values[-1][name] < 0.95 * first, (name, first, values[-1][name])


def test_what_ships_finds_the_things_of_scenes_it_was_not_trained_on(scenes):
    found = accuracy(load_detector(), scenes)
    assert found.recall >= 0.85, str(found)
    assert found.precision >= 0.9, str(found)
    assert found.colour >= 0.9, str(found)


def test_the_one_of_toy_words_sees_what_the_other_misses():
    """Birds and hats in hands, riders on dogs; and the older world still."""
    assert (ToyWorldDetector(spoken=True).name, ToyWorldDetector().name) == ("toy-words detector", "toy detector")
    own, older = open_detector("toy-words").network, open_detector("toy").network
    spoken = [world.draw_scene(77, i, spoken=True) for i in range(60)]
    found, missed = accuracy(own, spoken), accuracy(older, spoken)
    assert found.recall > missed.recall and found.precision > missed.precision, f"{found}; {missed}"
    assert min(found.recall, found.precision, found.colour) > 0.95, str(found)
    assert accuracy(own, [world.draw_scene(77, i) for i in range(60)]).recall > 0.95


def test_the_one_of_toy_words_finds_what_no_model_was_trained_on():
    """A dog in a boat: a judge that cannot see a combination counts every picture of it as a fault."""
    own = open_detector("toy-words").network
    unseen = [world.draw_scene(77, i, spoken=True, held_out=True) for i in range(40)]
    found = accuracy(own, unseen)
    assert min(found.recall, found.precision) > 0.93, str(found)
    afloat = [s for s in unseen if {"dog", "boat"} <= {name.split()[-1] for name in s.graph.objects}]
    assert len(afloat) > 5 and accuracy(own, afloat).missed["dog"] < len(afloat) / 3


def test_the_training_scenes_of_toy_words_are_of_four_kinds():
    four, older = draw_targets(5, 4, spoken=True), draw_targets(5, 4)
    assert (four.images == older.images).all(axis=(1, 2, 3)).tolist() == [True, False, False, False]
    for i, kind in enumerate(SPOKEN_KINDS):
        assert (four.images[i] == world.draw_scene(5, i, **kind).image).all()


def test_it_is_blind_to_what_is_not_there(scenes):
    """The same scenes with each other's pictures: the figures fall, so the test above can fail."""
    found = accuracy(load_detector(), scenes, np.roll(np.stack([s.image for s in scenes]), 1, axis=0))
    assert found.recall < 0.5


def test_missing_weights_name_the_file_and_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"none.safetensors: .*toy.build detector"):
        load_detector(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"toy.build features"):
        load_features(tmp_path / "none.safetensors")


@pytest.mark.usefixtures("few_scenes")
def test_the_detector_of_toy_words_starts_from_the_shipped_one(tmp_path):
    """One step of warm-up changes next to nothing, and it is measured on scenes of `toy-words`."""
    trained, shipped = train_detector(tmp_path, 1, 4, spoken=True), load_detector(SPOKEN_WEIGHTS)
    moved = [(a - b).abs().max() for a, b in zip(trained.parameters(), shipped.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-4
    said = (tmp_path / "detector_words" / "log.txt").read_text()
    held_out = [world.draw_scene(world.HELD_OUT_SEED, i, **SPOKEN_KINDS[1 + 2 * (i % 2)]) for i in range(8)]
    assert f"recall {accuracy(trained, held_out).recall:.4f}" in said
