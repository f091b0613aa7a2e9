"""Updates behind backward: the bits of one update after it, in every form; what a bad gradient skips; checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cases.engine import assert_same, built, train  # noqa: F401  (fixtures)
from support.cases.stage import cache, foundation  # noqa: F401  (fixtures)

from sgg_fast.config import OptimConfig
from sgg_fast.train.backward.behind import goes_behind
from sgg_fast.train.engines.captured import CapturedEngine

FORMS = [
    ({"weights": "master", "optimizer": "adam", "accumulation_steps": 2}, 20),
    ({"weights": "split", "optimizer": "adam8bit"}, 20),
    ({"weights": "lean", "optimizer": "adam4bit"}, 20),
    ({"weights": "lean", "optimizer": "adafactor", "fuse_unet": "on", "gradient_checkpointing": True}, 6),
]
"""Settings, and steps."""


@pytest.mark.parametrize(("changes", "steps"), FORMS)
def test_segments_are_one_update_after_backward(built, changes, steps, tmp_path):
    """With a resumed run in the middle."""
    after, behind, resumed = (built(how, **changes) for how in ("after", "behind", "behind"))
    expected = train(after, range(steps))
    found = train(behind, range(steps // 2))
    behind.save(tmp_path)
    resumed.load(tmp_path)
    assert found + train(resumed, range(steps // 2, steps)) == expected
    assert_same(resumed, after)
    assert all(p.grad is None for p in resumed.parameters) and not resumed.behind.gradients
    assert len(resumed.behind.buckets) > 4


@pytest.mark.parametrize(
    ("start", "end"), [("after", "behind"), ("in backward", "behind"), ("behind", "after"), ("behind", "in backward")]
)
def test_each_form_goes_on_from_the_state_of_another(built, start, end, tmp_path):
    made = {"weights": "lean", "optimizer": "adam8bit"}
    whole, first, second = built("after", **made), built(start, **made), built(end, **made)
    train(whole, range(2))
    train(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path)
    assert train(second, range(2, 4)) == train(whole, range(2, 4))
    assert_same_weights(second, whole)


def assert_same_weights(found: CapturedEngine, expected: CapturedEngine) -> None:
    assert all(p.equal(q) for p, q in zip(found.module.parameters(), expected.module.parameters(), strict=True))


def test_a_bad_gradient_skips_its_segment_alone(built, tmp_path):
    """It counts its own steps from then on, in checkpoints too."""
    engine = built("behind")
    train(engine, range(2))
    segments = engine.behind.buckets
    bad = segments[len(segments) // 2]
    before = [p.detach().clone() for p in engine.parameters]
    hook = engine.parameters[bad[0]].register_hook(lambda grad: torch.full_like(grad, torch.nan))
    assert not engine.update(np.array([[0, 1]]), 2).applied
    hook.remove()
    moved = {i for i, p in enumerate(engine.parameters) if not p.equal(before[i])}
    assert not moved & set(bad) and len(moved) > len(engine.parameters) // 2
    assert engine.optimizer.norm.isnan()
    train(engine, range(3, 4))
    steps = [engine.optimizer.state_dict()["state"][i]["step"] for i in range(len(before))]
    assert {steps[i] for i in bad} == {3} and set(steps) == {3, 4}
    engine.save(tmp_path)
    resumed = built("behind")
    resumed.load(tmp_path)
    assert train(resumed, range(4, 6)) == train(engine, range(4, 6))
    assert_same(resumed, engine)


def test_a_loss_that_is_not_finite_skips_all(built):
    engine = built("behind")
    train(engine, range(1))
    before = [p.detach().clone() for p in engine.parameters]
    names, images, *rest = engine.module._frozen
    engine.module._frozen = (names, torch.full_like(images, torch.inf), *rest)
    assert not engine.update(np.array([[4, 5]]), 1).applied
    assert all(map(torch.equal, engine.parameters, before))


def test_segments_start_while_backward_runs(built):
    """In backward's order: those of the last layers before the first layer has its gradient."""
    engine = built("behind")
    train(engine, range(1))
    begun: list[int] = []
    for layer in (engine.module.unet.conv_out, engine.module.unet.conv_in):
        layer.weight.register_post_accumulate_grad_hook(lambda _: begun.append(engine.behind._num_started))
    train(engine, range(1, 2))
    first, last = begun
    assert first == 0 and last > len(engine.behind.buckets) // 2


def test_only_where_no_norm_of_all_gradients_is_needed():
    unclipped = OptimConfig(max_grad_norm=0.0)
    in_backward = OptimConfig(max_grad_norm=0.0, optimizer_in_backward=True, optimizer="adam8bit")
    assert goes_behind(unclipped, 1)
    assert not any([goes_behind(OptimConfig(), 1), goes_behind(in_backward, 1), goes_behind(unclipped, 2)])
