"""Bucketed batches and the captured step are the bare eager step; the step keeps the rules of capture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from support.cases.capture import FORBIDDEN, Watcher, visual_genome
from support.cases.stage import GRAPHS, IDS, STEP, cache, pretrain_stage  # noqa: F401  (a fixture)

from sgg_fast import ops
from sgg_fast.nn.conditioner import context_length
from sgg_fast.train.buckets import GROWTH, Bucket, Buckets, ContextBuckets
from sgg_fast.train.engines.captured import CapturedEngine, run_part
from sgg_fast.train.engines.eager import EagerEngine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _auto_kernels():
    yield
    ops.use_kernels("auto")


def test_the_papers_batch_has_one_bucket():
    """Batch 2, full and masked copies of the largest graphs: N 128, E 256."""
    assert Buckets(visual_genome(), 2).ladder == [(128, 256)]
    assert Buckets(visual_genome(), 2).bounds == (31, 60)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 512])
def test_every_batch_fits_its_bucket_and_padding_stays_small(batch):
    sizes = visual_genome()
    buckets, rng, seen = Buckets(sizes, batch), np.random.default_rng(1), Counter()
    draws = [rng.permutation(len(sizes))[:batch] for _ in range(200)]
    largest = np.argsort(sizes[:, 0])[-batch:]
    worst = np.full(batch, sizes[:, 1].argmax())
    for ids in [*draws, largest, worst]:
        (num_n, num_e), bucket = 2 * sizes[ids].sum(axis=0), buckets.of(ids[None]).shape
        assert bucket[0] > num_n and bucket[1] >= num_e
        smaller = [rung for rung in buckets.ladder if rung < bucket]
        assert not smaller or smaller[-1][0] <= num_n or smaller[-1][1] < num_e, "the smallest that holds it"
        seen[bucket] += 1
    if batch >= 64:
        waste = [b[1] / (2 * sizes[ids, 1].sum()) - 1 for ids in draws for b in [buckets.of(ids[None]).shape]]
        assert np.mean(waste) < 2 * (GROWTH - 1)
    if batch == 512:
        assert len(seen) <= 6, "few graphs to capture"


def test_bucketed_terms_and_gradients_are_those_of_the_bare_batch(cache):
    stage = pretrain_stage(cache)
    found = []
    for bucket in (None, (160, 320)):
        stage.zero_grad()
        terms = stage(IDS, STEP, bucket)
        terms.total.backward()
        found.append((terms, {n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None}))
    bare, grads = found[0]
    for terms, bucketed in found[1:]:
        for name, value in bare.losses.items():
            torch.testing.assert_close(terms.losses[name], value, rtol=1e-5, atol=1e-6)
            assert terms.chance[name] == bare.chance[name]
        assert bucketed.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(bucketed[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def engines(cache, **changes) -> tuple[EagerEngine, CapturedEngine]:
    """The eager engine and the capturing one, each with a stage of its own, alike."""
    made = []
    for kind in (EagerEngine, CapturedEngine):
        stage = pretrain_stage(cache, batch_size=2, pretrain_lr=1e-3, **changes)
        made.append(kind(stage, CPU))
    return made[0], made[1]


def buffer_of(engine: EagerEngine | CapturedEngine) -> torch.Tensor:
    """All weights, flat."""
    (group,) = engine.optimizer._groups
    return group.flat.buffer


def moments_of(engine: CapturedEngine) -> list[torch.Tensor]:
    (group,) = engine.optimizer._groups
    return list(group.moments)


def batches(num: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.permutation(len(GRAPHS))[:2] for _ in range(num)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contrastive": "infonce", "num_negatives": 5},
        {"ema": 0.9, "max_grad_norm": 0.01},
        {"graph_negatives": True, "instance_codes": True},
    ],
)
def test_the_captured_step_trains_like_the_eager_one(cache, changes):
    plain, captured = engines(cache, **changes)
    for step, ids in enumerate(batches(5)):
        factor = 1 / (1 + step)
        expected, found = (engine.update(ids[None], step, factor) for engine in (plain, captured))
        assert found.applied and found.losses.keys() == expected.losses.keys()
        for side in ("losses", "chance"):
            for name, value in getattr(expected, side).items():
                torch.testing.assert_close(getattr(found, side)[name], value, rtol=2e-4, atol=1e-5)
    assert plain.optimizer.num_steps == captured.optimizer.num_steps == 5, "steps of the warm-up do not count"
    with plain.exported(), captured.exported():
        theirs = dict(plain.module.named_parameters())
        for name, parameter in captured.module.named_parameters():
            found, expected = parameter, theirs[name]
            if name.endswith("in_proj_bias"):  # that of the keys changes nothing: its gradient is rounding alone
                found, expected = (torch.stack([q, v]) for q, _, v in (b.chunk(3) for b in (parameter, theirs[name])))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_warming_up_changes_nothing(cache):
    _, captured = engines(cache)
    before = {k: v.clone() for k, v in captured.module.state_dict().items()}
    ids = np.array([0, 1])
    bucket = captured.buckets.of(ids[None])
    captured.fill(captured._table, ids, 0, bucket)
    captured.warm_up(bucket)
    assert all(torch.equal(v, before[k]) for k, v in captured.module.state_dict().items())
    assert captured.optimizer.num_steps == 0 and not any(m.any() for m in moments_of(captured))
    assert all(p.grad is None for p in captured.module.parameters())


def test_a_step_that_is_not_finite_is_skipped_and_repeats_the_values(cache):
    _, captured = engines(cache)
    names, targets, images = captured.module._frozen
    first = captured.update(np.array([[0, 1]]), 0).losses["loss"].item()
    poisoned = images.clone()
    poisoned[2] = float("inf")
    captured.module._frozen = (names, targets, poisoned)
    before = buffer_of(captured).clone()
    update = captured.update(np.array([[2, 3]]), 1)
    assert not update.applied and update.losses["loss"].item() == first
    assert torch.equal(buffer_of(captured), before)
    captured.module._frozen = (names, targets, images)
    assert captured.update(np.array([[2, 3]]), 2).applied and not torch.equal(buffer_of(captured), before)


@pytest.mark.parametrize("contrastive", ["bce", "infonce"])
def test_the_step_keeps_the_rules_of_capture(cache, contrastive):
    """On the kernels (interpreted), whose insides are launches: no operator of the rest may touch the host."""
    ops.use_kernels("triton")
    _, captured = engines(cache, contrastive=contrastive, num_negatives=5, max_grad_norm=1.0)
    ids = np.array([0, 1])
    bucket = Bucket((32, 64), captured.buckets.bounds)  # as little as these two take, for the interpreter
    captured.fill(captured._table, ids, 0, bucket)
    captured._sum, captured._row, captured._names = torch.zeros(6), torch.zeros(6), (["loss", "mae", "con"],) * 2
    addresses = torch.zeros(1, 3, dtype=torch.int64)
    taken = torch.ones(())
    with Watcher() as watcher, pytest.MonkeyPatch.context() as patch:
        # Filled after a capture; here it must not be read before.
        patch.setattr(captured.optimizer, "launch", lambda *args: taken.zero_())
        for part in captured.parts(bucket, addresses):
            run_part(part)
    assert taken == 0 and watcher.seen["mm"] > 10
    assert not FORBIDDEN & set(watcher.seen), FORBIDDEN & set(watcher.seen)


def test_the_rules_can_be_broken():
    with Watcher() as watcher:
        torch.tensor(1.0)
        torch.ones(1).item()
        torch.ones(2)[torch.ones(2, dtype=torch.bool)]
    assert set(watcher.seen) >= {"_local_scalar_dense", "lift_fresh"}


@pytest.mark.gpu
def test_captured_and_eager_steps_agree_on_cuda(cache):
    """40 steps over several buckets: losses as the eager engine's, weights within rounding, and no sync in a replay."""
    device = torch.device("cuda")
    on_card = cache.to(device)
    stages = []
    for _ in range(2):
        stage = pretrain_stage(cache, batch_size=2)
        stage.conditioner.to(device)
        made = type(stage)(stage.config, stage.conditioner, on_card)
        made.load_state_dict(stage.state_dict())
        stages.append(made.to(device))
    plain = EagerEngine(stages[0], device)
    captured = CapturedEngine(stages[1], device)
    for step, ids in enumerate(batches(40)):
        expected = plain.update(ids[None], step)
        if step > 8:
            torch.cuda.set_sync_debug_mode("error")
        found = captured.update(ids[None], step)
        torch.cuda.set_sync_debug_mode("default")
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(buffer_of(captured), buffer_of(plain), rtol=1e-2, atol=1e-3)


def test_each_context_length_has_one_worst_case():
    """Of the published sets T is 80 throughout: one bucket, of two graphs N 64 and E 128."""
    sizes = visual_genome()
    assert {length: bucket.shape for length, bucket in ContextBuckets(sizes, 2).ladder.items()} == {80: (64, 128)}
    rng = np.random.default_rng(0)
    sizes = np.concatenate([sizes, [[40, 79], [45, 95]]])
    buckets = ContextBuckets(sizes, 8)
    assert list(buckets.ladder) == [80, 96, 112]
    for ids_KB in (rng.integers(0, len(sizes), (3, 8)) for _ in range(50)):
        bucket = buckets.of(ids_KB)
        assert context_length(bucket.bounds[1]) == max(context_length(e) for e in sizes[ids_KB, 1].flatten().tolist())
        num_n, num_e = sizes[ids_KB].sum(axis=1).max(axis=0)
        assert bucket.shape[0] > num_n and bucket.shape[1] >= num_e
        assert (sizes[ids_KB].max(axis=(0, 1)) <= bucket.bounds).all()


def test_examples_are_every_context_length_the_longest_first():
    sizes = np.concatenate([visual_genome(), [[40, 79], [45, 95]]])
    buckets = ContextBuckets(sizes, 8)
    examples = buckets.examples()
    assert [context_length(bucket.bounds[1]) for bucket in examples] == [112, 96, 80]
    for bucket, sample in examples.items():
        num_n, num_e = 8 * sizes[sample]
        assert bucket.shape[0] > num_n and bucket.shape[1] >= num_e, "any number of this sample fits"
    assert Buckets(sizes, 8).examples() == {}, "warmed up as they are met"
