"""What the plain engines share: loss scale, average, fp32 products, gradients of several processes, saved state."""

from __future__ import annotations

import pytest
import torch
from support.cases.plain import IDS, POISONED, built, same, stage, weights_of  # noqa: F401  (fixtures)

from sgg_fast.train.engines.state import in_matmul_precision
from sgg_fast.train.optim.adam_flat import FlatAdam


def test_fp16_lowers_its_scale_by_a_bad_step_and_raises_it_by_many_good_ones(built, tmp_path):
    engine = built(precision="fp16")
    scale = engine.scale
    first = scale.value
    engine.update(POISONED, 0)
    assert (scale.value, scale.good_steps) == (first / 2, 0)
    engine.update(IDS, 0)
    engine.save(tmp_path)
    for _ in range(1999):
        scale.update(True)
    assert scale.value == first
    engine.load(tmp_path)
    assert (scale.value, scale.good_steps) == (first / 2, 1)


def test_the_average_follows_its_formula_and_is_what_a_result_holds(built):
    engine = built(ema=0.15, optimizer="adam")
    name, watched = "unet.conv_in.weight", engine.module.unet.conv_in.weight
    average = watched.detach().clone()
    for n in range(1, 5):
        engine.update(IDS, n)
        decay = min(0.15, n / (n + 9))
        average = decay * average + (1 - decay) * watched.detach()
    last = watched.detach().clone()
    torch.testing.assert_close(weights_of(engine)[name], average)
    assert watched.equal(last) and not torch.allclose(average, last, rtol=0, atol=1e-6)
    engine.update(POISONED, 9)
    torch.testing.assert_close(weights_of(engine)[name], average)


@pytest.mark.parametrize(("asked", "inside"), [("high", "high"), ("", "highest")])
def test_the_process_keeps_its_own_precision(asked, inside):
    """Also if a step raises."""

    class Engine:
        matmul_precision = asked

        @in_matmul_precision
        def update(self, fails):
            seen.append(torch.get_float32_matmul_precision())
            if fails:
                raise RuntimeError("out of memory")

    seen: list[str] = []
    assert torch.get_float32_matmul_precision() == "highest"
    Engine().update(False)
    with pytest.raises(RuntimeError, match="out of memory"):
        Engine().update(True)
    assert seen == [inside, inside] and torch.get_float32_matmul_precision() == "highest"


def test_a_loaded_engine_goes_on_as_the_saved_one(built, tmp_path):
    """Weights, optimiser and average; an eager step has nothing to report later."""
    first, second = (built(ema=0.5) for _ in range(2))
    first.update(IDS, 0)
    first.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"weights.safetensors", "optimizer.pt", "average.safetensors"}
    second.load(tmp_path)
    assert second.average.num_steps == 1
    for engine in (first, second):
        assert engine.update(IDS, 1).applied and engine.outstanding() == []
    assert same(weights_of(first), weights_of(second)) and same(first.module.state_dict(), second.module.state_dict())


def test_a_result_of_split_weights_is_in_fp32(built):
    """The halves put together, half a place of bf16 away from those that compute at most; afterwards these are back."""
    engine = built(weights="split", optimizer="adam8bit")
    engine.update(IDS, 0)
    unet = dict(engine.module.unet.named_parameters())
    narrow = {name: p.detach().clone() for name, p in unet.items()}
    with engine.exported():
        whole = {name: p.detach().clone() for name, p in unet.items()}
    assert {p.dtype for p in whole.values()} == {torch.float32}
    for name, p in whole.items():
        rounded = narrow[name].float()
        assert ((p - rounded).abs() <= 2**-8 * rounded.abs()).all(), name
    assert any(not p.equal(narrow[name].float()) for name, p in whole.items())
    assert same({name: p.detach() for name, p in unet.items()}, narrow)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_sum_over_processes_takes_the_place_of_the_hooks(built, in_backward):
    """Silent here, so its sums are this process's own gradients: the bits of an engine without it."""
    changes = {"optimizer": "adam8bit", "max_grad_norm": 0.0, "optimizer_in_backward": in_backward}
    plain, summed = built(**changes), built(**changes)
    assert plain.gradient_sum is None
    summed.gradient_sum = summed._gradient_sum()
    assert isinstance(plain.optimizer, FlatAdam) == in_backward
    before = weights_of(plain)
    with summed.gradient_sum.silent():
        for step in range(2):
            losses = [engine.update(IDS, step).losses["loss"] for engine in (plain, summed)]
            assert losses[0].equal(losses[1])
    assert same(weights_of(summed), weights_of(plain)) and not same(weights_of(plain), before)
    assert len(summed.gradient_sum.buckets) > 0
