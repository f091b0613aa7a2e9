"""Validation of pre-training: which pairs are held out, the accuracies against loops, early stop, what the log says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import loops
from support.cases.stage import cache, pretrain_stage  # noqa: F401  (a fixture)
from support.tiny_runs import lines, rows, same_weights, train, trainer

from sgg_fast.config import ConfigError, RunConfig
from sgg_fast.data.sources import PairSource
from sgg_fast.graph import SceneGraph
from sgg_fast.train import validation
from sgg_fast.train.validation import MASK_STEP, Validation, Watch, nearest, retrieved, split_pairs

RETRIEVAL = {f"{way}_top{k}" for way in ("graph_to_image", "image_to_graph") for k in (1, 5)}


def source(num_images: int, draws: int = 1) -> PairSource:
    return PairSource([SceneGraph(("sheep",))] * (num_images * draws), lambda i: np.zeros((8, 8, 3)), "none", draws)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("flip", ["none", "swap"])
def test_no_copy_of_a_held_out_image_trains(draws, flip):
    num = 80
    trained, held_out = split_pairs(RunConfig(validation_pairs=5, seed=3), source(num, draws), flip == "swap")
    assert len(set(held_out.tolist())) == 5 and list(held_out) == sorted(held_out)
    pictures = num // 2 if flip == "swap" else num
    assert held_out.max() < pictures, "the first graph of each, unmirrored"
    kept_out = {i for i in range(num * draws) if i % num % pictures in set(held_out.tolist())}
    assert len(kept_out) == 5 * draws * (1 + (flip == "swap"))
    assert set(trained.tolist()) == set(range(num * draws)) - kept_out


def test_the_seed_draws_and_an_eighth_is_the_limit():
    drawn = [split_pairs(RunConfig(validation_pairs=64, seed=seed), source(160))[1].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 20
    assert 0.2 < np.mean(drawn[0]) / 159 < 0.8, "from all of the set, not from an end"


@pytest.mark.parametrize(("pairs", "images"), [(0, 100), (1, 100), (32, 15)])
def test_without_two_pairs_everything_trains(pairs, images):
    trained, held_out = split_pairs(RunConfig(validation_pairs=pairs), source(images))
    assert list(trained) == list(range(images)) and not len(held_out)
    with pytest.raises(ConfigError, match=f"--early-stop 2 needs pairs to watch.*has {images}"):
        split_pairs(RunConfig(validation_pairs=pairs, early_stop=2), source(images))


def test_early_stop_needs_validations():
    with pytest.raises(ConfigError, match="--early-stop 2 needs validations"):
        RunConfig(early_stop=2, validate_every=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_retrieved_against_loops(k):
    matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(k)) + torch.eye(24)
    hits = [i in sorted(range(24), key=lambda j: -float(matrix[i, j]))[:k] for i in range(24)]
    assert 0 < sum(hits) < 24
    assert float(retrieved(matrix, k)) == pytest.approx(sum(hits) / 24)


def test_equal_similarities_score_nothing():
    assert retrieved(torch.ones(6, 6), 5) == 0 and retrieved(torch.ones(6, 6), 6) == 1


def test_an_encoder_that_gives_nan_retrieves_nothing():
    """NaN is not at least itself: counted as the rows that are better, it would come first everywhere."""
    matrix = torch.eye(6)
    matrix[2] = torch.nan
    assert float(retrieved(matrix, 1)) == pytest.approx(5 / 6) and retrieved(torch.full((6, 6), torch.nan), 5) == 0


def test_nearest_against_loops():
    generator = torch.Generator().manual_seed(0)
    predicted, words = torch.randn(20, 4, generator=generator), torch.randn(7, 4, generator=generator)
    expected = [min(range(7), key=lambda v: math.dist(p, words[v].tolist())) for p in predicted.tolist()]
    assert nearest(predicted, words).tolist() == expected


def test_measures_against_loops(cache, monkeypatch):
    """Sample by sample, each alone; chunks of three, so that more than one is put together."""
    monkeypatch.setattr(validation, "CHUNK", 3)
    stage = pretrain_stage(cache)
    ids = np.array([5, 0, 4, 2, 1, 6, 7])
    scores = Validation(stage, ids).measure()
    assert stage.training, "left as it was"
    images = stage.conditioner.centre_images(cache.images)
    _, targets, _ = stage._frozen
    with torch.no_grad():
        alone = [stage.encode(ids[i : i + 1], MASK_STEP) for i in range(7)]
        cosines = [[loops.cosine(one.x_global[0], images[j]) for j in ids] for one in alone]
    for name, table in (("graph_to_image", cosines), ("image_to_graph", list(zip(*cosines, strict=True)))):
        for k in (1, 5):
            hits = [sum(other >= row[i] for other in row) <= k for i, row in enumerate(table)]
            assert scores.values[f"{name}_top{k}"] == pytest.approx(sum(hits) / 7)
            assert scores.chance[f"{name}_top{k}"] == pytest.approx(k / 7)
    words = set(cache.graphs.object_name[cache.graphs.object_pooled.bool()].tolist())
    assert cache.table.add("__image__") not in words
    right, true = 0, []
    for one in alone:
        with torch.no_grad():
            predicted, name, masked = stage.decode(one)
        for guess, word in zip(predicted[masked].tolist(), name[masked].tolist(), strict=True):
            true.append(word)
            right += word == min(words, key=lambda v: math.dist(guess, targets[v].tolist()))
    assert len(true) > 10
    assert scores.values["masked_object"] == pytest.approx(right / len(true))
    assert scores.chance["masked_object"] == pytest.approx(max(map(true.count, true)) / len(true))
    assert Validation(stage, ids).measure() == scores


def test_a_perfect_model_scores_one(cache, monkeypatch):
    """X_global is the image's own embedding, the decoder says the target: every accuracy is 1."""
    stage = pretrain_stage(cache)
    _, targets, images = stage._frozen
    ids, encode, decode = np.array([5, 0, 2, 1, 6, 7]), stage.encode, stage.decode

    def encoded(ids: np.ndarray, step: int):
        found = encode(ids, step)
        found.x_global[: len(ids)] = 3 * images[ids]
        return found

    def decoded(found):
        _, name, masked = decode(found)
        return targets[name], name, masked

    monkeypatch.setattr(stage, "encode", encoded)
    monkeypatch.setattr(stage, "decode", decoded)
    assert set(Validation(stage, ids).measure().values.values()) == {1.0}


@pytest.mark.parametrize(("left_out", "names"), [("con_weight", {"masked_object"}), ("mae_weight", RETRIEVAL)])
def test_what_is_not_trained_is_not_measured(cache, left_out, names):
    stage = pretrain_stage(cache, **{left_out: 0.0})
    scores = Validation(stage, np.array([5, 0, 2, 1, 6, 7])).measure()
    assert set(scores.values) == set(scores.chance) == names
    assert validation.Scores({}, {}).overall == 0


class Silent:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def validated(self, step, values, chance) -> None:
        self.seen.append(step)

    def event(self, **fields) -> None:
        self.seen.append(fields["event"])


def test_early_stop_counts_validations_without_improvement(cache):
    stage = pretrain_stage(cache)
    log, watch = Silent(), Watch(RunConfig(validate_every=10, early_stop=2), stage, np.array([0, 1, 2]))
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    watch.validation.measure = lambda: validation.Scores({"x": next(scores)}, {"x": 0.1})  # type: ignore[method-assign]
    stops = [watch.look(step, False, log) for step in range(1, 41)]
    assert stops == [step == 40 for step in range(1, 41)], "two in a row, equal is no improvement"
    assert log.seen == [10, 20, 30, 40, "early stop"]
    again = Watch(watch.run, stage, np.array([0, 1, 2]), watch.state)
    assert again.state == {"best": 0.3, "since": 2}


SET = {"num_scenes": 32, "validation_pairs": 4, "validate_every": 2, "pretrain_steps": 6}


def test_a_run_logs_validations_and_resumes_bit_for_bit(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = train(tmp_path / "whole", "pretrain", **SET)
    found = [line for line in lines(whole.parent) if line.get("event") == "validation"]
    assert [line["step"] for line in found] == [2, 4, 6]
    names = {f"{a}_to_{b}_top{k}" for a, b in (("graph", "image"), ("image", "graph")) for k in (1, 5)}
    for line in found:
        assert set(line) == {"event", "step"} | {
            f"{n}{c}" for n in {*names, "masked_object"} for c in ("", "_at_chance")
        }
        assert line["graph_to_image_top1_at_chance"] == 0.25 and line["image_to_graph_top5_at_chance"] == 1
    assert next(line for line in lines(whole.parent) if line["event"] == "start")["samples"] == 28
    events = EventAccumulator(str(whole.parent / "tensorboard"))
    events.Reload()
    board = events.Scalars("validation/masked_object")
    assert [s.step for s in board] == [line["step"] for line in found]
    assert [s.value for s in board] == pytest.approx([line["masked_object"] for line in found], abs=1e-5)
    remaining = [line["remaining_s"] for line in lines(whole.parent) if "event" not in line]
    assert remaining[0] > 0 and remaining[-1] == 0

    train(tmp_path / "parts", "pretrain", **{**SET, "pretrain_steps": 3}, checkpoint_every=3)
    # Validations change nothing of the training, and may be left out in the second half.
    parts = train(tmp_path / "parts", "pretrain", **{**SET, "validate_every": 0})
    assert rows(parts.parent) == rows(whole.parent) and same_weights(parts, whole)


def test_early_stop_ends_the_run_and_keeps_its_result(tmp_path):
    """At learning rate 0 nothing improves: the second validation of two is one too many."""
    still = {**SET, "pretrain_steps": 40, "pretrain_lr": 0.0, "early_stop": 1}
    run = trainer(tmp_path, "pretrain", **still)
    seen: list[int] = []
    update = run.engine.update
    run.engine.update = lambda ids, *rest: (seen.extend(ids.flatten().tolist()), update(ids, *rest))[1]
    result = run.train()
    told = [(line.get("event"), line["step"]) for line in lines(result.parent)]
    ends = [("validation", 2), ("checkpoint", 2), ("validation", 4), ("early stop", 4), ("checkpoint", 4), ("done", 4)]
    assert [line for line in told if line[0] not in (None, "start")] == ends
    assert not set(seen) & set(run.watch.validation.ids.tolist()) and len(seen) == 8
    assert (result / "config.json").is_file()
    again = trainer(tmp_path, "pretrain", **still)
    assert again.complete, "the same command has nothing left to do"
    on = trainer(tmp_path, "pretrain", **{**still, "early_stop": 0, "pretrain_steps": 5})
    assert (on.complete, on.first_step, on.num_steps) == (False, 4, 5)
