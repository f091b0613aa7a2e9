"""The forward process against diffusers' own scheduler, and the draws of a training step against their definition."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from support import loops

from sgg_fast.diffusion import noise

SHAPE = (3, 2, 4, 4)


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


@pytest.fixture(scope="module")
def drawn(scheduler) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 437, 999])
    return {
        "z_0": torch.randn(SHAPE, generator=generator),
        "eps": torch.randn(SHAPE, generator=generator),
        "t": t,
        "abar": scheduler.alphas_cumprod[t],
    }


def test_add_noise_is_the_schedulers(scheduler, drawn):
    found = noise.add_noise(drawn["z_0"], drawn["eps"], drawn["abar"])
    torch.testing.assert_close(found, scheduler.add_noise(drawn["z_0"], drawn["eps"], drawn["t"]), rtol=1e-6, atol=1e-6)


def test_velocity_target_is_the_schedulers(scheduler, drawn):
    found = noise.target_of("v_prediction", drawn["z_0"], drawn["eps"], drawn["abar"])
    expected = scheduler.get_velocity(drawn["z_0"], drawn["eps"], drawn["t"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_epsilon_target_is_the_noise(drawn):
    assert torch.equal(noise.target_of("epsilon", drawn["z_0"], drawn["eps"], drawn["abar"]), drawn["eps"])


def test_other_prediction_types_are_refused(drawn):
    with pytest.raises(ValueError, match="'sample' of the scheduler is not supported"):
        noise.target_of("sample", drawn["z_0"], drawn["eps"], drawn["abar"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predicted_z0_inverts_the_forward_process(drawn, kind):
    """A perfect prediction gives back the clean latent; a wrong one gives what DDIM itself would use."""
    z_0, eps, abar = (drawn[k].double() for k in ("z_0", "eps", "abar"))
    z_t = noise.add_noise(z_0, eps, abar)
    target = noise.target_of(kind, z_0, eps, abar)
    torch.testing.assert_close(noise.predicted_z0(kind, target, z_t, abar), z_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predicted_z0_is_what_ddim_uses(drawn, kind):
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type=kind
    )
    ddim.set_timesteps(10)
    for i, t in enumerate(drawn["t"]):
        prediction, z_t = drawn["eps"][i : i + 1], drawn["z_0"][i : i + 1]
        expected = ddim.step(prediction, int(t), z_t).pred_original_sample
        found = noise.predicted_z0(kind, prediction, z_t, drawn["abar"][i : i + 1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predicted_z0_and_its_gradient_are_finite_where_all_is_noise(kind, dtype):
    """abar = 0, the last step of zero terminal SNR, beside a step that is not touched by it."""
    abar = torch.tensor([0.0, 0.25])
    z_t, predicted = torch.ones(2, 1, 1, 1, dtype=dtype), torch.full((2, 1, 1, 1), 0.5, dtype=dtype, requires_grad=True)
    told = noise.predicted_z0(kind, predicted, z_t, abar)
    told.float().square().sum().backward()
    assert told.isfinite().all() and predicted.grad.isfinite().all()
    root, part = 0.25**0.5, 0.75**0.5
    expected = (1 - part * 0.5) / root if kind == "epsilon" else root - part * 0.5
    assert told.flatten().tolist() == pytest.approx([0.0 if kind == "epsilon" else -0.5, expected], rel=1e-2)


def test_timesteps_follow_the_hash_and_are_uniform():
    samples = torch.arange(20_000)
    t = noise.draw_timesteps(5, 6, samples, 1000)
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999
    for i in range(50):
        assert t[i] == int(loops.uniform(5, 6, i, noise.STREAM_TIME) * 1000)
    counts = torch.bincount(t // 50, minlength=20).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 6 * 6.2
    assert not torch.equal(t, noise.draw_timesteps(5, 7, samples, 1000))


@pytest.mark.parametrize("stream", [noise.STREAM_DROP, noise.STREAM_BARE])
def test_dropping_follows_the_hash_at_its_rate(stream):
    samples = torch.arange(20_000)
    dropped = noise.draw_share(5, 6, samples, 0.1, stream)
    assert dropped.dtype == torch.bool
    assert abs(dropped.double().mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert dropped[:200].tolist() == [loops.uniform(5, 6, i, stream) < 0.1 for i in range(200)]
    assert not noise.draw_share(5, 6, samples, 0.0, stream).any()
    assert noise.draw_share(5, 6, samples, 1.0, stream).all()


def test_negatives_are_uniform_over_all_but_the_sample_itself():
    own = torch.arange(5)
    negatives = torch.cat([noise.draw_negatives(0, step, own, 64, 5) for step in range(40)], dim=1)
    assert negatives.shape == (5, 2560)
    for i, row in enumerate(negatives):
        counts = torch.bincount(row, minlength=5).double()
        assert counts[i] == 0
        others = torch.cat([counts[:i], counts[i + 1 :]])
        assert ((others - 640) ** 2 / 640).sum() < 3 + 6 * 2.5


def test_negatives_follow_the_hash():
    for own in (0, 3, 6):
        found = noise.draw_negatives(1, 2, torch.tensor([own]), 6, 7)[0].tolist()
        others = [i for i in range(7) if i != own]
        assert found == [others[loops.hash_u32(1, 2, own, noise.STREAM_NEGATIVE, k) % 6] for k in range(6)]


def test_the_only_other_image_is_the_negative_of_two():
    assert noise.draw_negatives(0, 0, torch.tensor([0, 1, 0]), 3, 2).tolist() == [[1] * 3, [0] * 3, [1] * 3]


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    batch = torch.tensor([7, 2, 9])
    for draw in (
        lambda s: noise.draw_timesteps(1, 2, s, 1000),
        lambda s: noise.draw_share(1, 2, s, 0.5, noise.STREAM_DROP),
        lambda s: noise.draw_negatives(1, 2, s, 4, 10),
    ):
        together = draw(batch)
        for i in range(3):
            assert torch.equal(together[i], draw(batch[i : i + 1])[0])


def test_streams_are_apart():
    streams = [getattr(noise, name) for name in dir(noise) if name.startswith("STREAM_")]
    assert len(streams) >= 5 and len(set(streams)) == len(streams)
