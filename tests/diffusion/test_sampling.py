"""Sampling: eq. 2 and DDIM against a loop written from the formulas, and a Gaussian whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from sgg_fast.diffusion.sampling import conditions, sample_latents
from sgg_fast.nn.fuse import fuse
from sgg_fast.toy.models import toy_unet

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(kind: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind)


def noise(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def alpha_bars(num_steps: int) -> list[tuple[int, float, float]]:
    """(t, alpha_bar_t, alpha_bar of the step after it) of SD's schedule, from its definition."""
    betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2 for i in range(1000)]
    table, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        table.append(product)
    stride = 1000 // num_steps
    steps = [i * stride + 1 for i in reversed(range(num_steps))]
    return [(t, table[t], table[t - stride] if t >= stride else table[0]) for t in steps]


def given(z: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(z) * (1 + t / 1000)


def null(z: torch.Tensor, t: int) -> torch.Tensor:
    return 0.3 * z - 0.1


class Denoiser:
    """Null condition in the first half, the condition in the second; remembers what it was called with."""

    def __init__(self, guided: bool) -> None:
        self.guided, self.calls = guided, []

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls.append((int(t), tuple(z.shape)))
        if not self.guided:
            return given(z, int(t))
        first, second = z.chunk(2)
        assert torch.equal(first, second)
        return torch.cat([null(first, int(t)), given(second, int(t))])


@pytest.mark.parametrize("guidance", [1.0, 7.5, 0.0])
@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_guided_ddim_against_a_loop(guidance, num_steps):
    denoise = Denoiser(guided=guidance != 1)
    found = sample_latents(denoise, ddim(), noise().double(), num_steps, guidance)
    z = noise().double()
    for t, now, after in alpha_bars(num_steps):
        eps = guidance * given(z, t) + (1 - guidance) * null(z, t)
        z_0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
        z = math.sqrt(after) * z_0 + math.sqrt(1 - after) * eps
    torch.testing.assert_close(found, z, rtol=2e-5, atol=2e-5)  # the scheduler's own table is fp32
    assert [t for t, _ in denoise.calls] == [t for t, _, _ in alpha_bars(num_steps)]
    assert {shape for _, shape in denoise.calls} == {(2 if guidance == 1 else 4, 3, 2, 2)}


def ideal(kind: str, spread: float, table: torch.Tensor):
    """The best denoiser of latents N(0, spread^2): E[eps | z_t] or E[v | z_t]."""

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = table[int(t)].to(z)
        variance = a * spread**2 + 1 - a
        eps, z_0 = (1 - a).sqrt() * z / variance, a.sqrt() * spread**2 * z / variance
        return eps if kind == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * z_0

    return denoise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_a_gaussian_is_sampled_exactly(kind, spread):
    """DDIM at eta 0 keeps z_t / sqrt(Var z_t) along the way, so z ends as noise scaled to the data's spread."""
    scheduler, start = ddim(kind), noise().double()
    found = sample_latents(ideal(kind, spread, scheduler.alphas_cumprod), scheduler, start, 500, 1.0)
    first, last = scheduler.alphas_cumprod[999].item(), scheduler.alphas_cumprod[0].item()
    scale = math.sqrt((last * spread**2 + 1 - last) / (first * spread**2 + 1 - first))
    torch.testing.assert_close(found, start * scale, rtol=1e-2, atol=1e-6)


def test_other_schedulers_work_and_get_their_own_scaling():
    """Euler starts from noise of its own sigma and takes no eta; the same Gaussian must come out."""
    scheduler, start, spread = EulerDiscreteScheduler(**SCHEDULE), noise().double(), 0.5

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ideal("epsilon", spread, scheduler.alphas_cumprod)(z, t.long())

    found = sample_latents(denoise, scheduler, start, 200, 1.0)
    assert scheduler.init_noise_sigma > 10
    torch.testing.assert_close(found, start * spread, rtol=0.05, atol=1e-3)


def test_a_sample_does_not_depend_on_its_neighbours():
    both = sample_latents(Denoiser(True), ddim(), noise(), 5, 7.5)
    for i in range(2):
        alone = sample_latents(Denoiser(True), ddim(), noise()[i : i + 1], 5, 7.5)
        torch.testing.assert_close(both[i], alone[0], rtol=1e-6, atol=1e-6)


def test_progress_sees_every_timestep_and_no_gradient_is_kept():
    seen = []

    def track(timesteps):
        for t in timesteps:
            seen.append(int(t))
            yield t

    start = noise().requires_grad_()
    out = sample_latents(Denoiser(True), ddim(), start, 4, 2.0, track)
    assert seen == [t for t, _, _ in alpha_bars(4)]
    assert not out.requires_grad and torch.equal(start, noise())


def test_noise_of_each_step_comes_from_the_samples_own_generators():
    def sample(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE)
        return sample_latents(Denoiser(True), scheduler, noise(), 5, 3.0, generator=generators)

    first, again, other = sample(1, 2), sample(1, 2), sample(1, 3)
    assert torch.equal(first, again) and torch.equal(first[0], other[0])
    assert (first[1] - other[1]).abs().max() > 1e-2


def test_after_each_step_the_latents_may_be_changed_or_the_sampling_ended():
    steps = []

    def halve(i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        steps.append((i, int(t)))
        return latents / 2

    changed = sample_latents(Denoiser(False), ddim(), noise().double(), 3, 1.0, on_step=halve)
    z = noise().double()
    for t, now, after in alpha_bars(3):
        eps = given(z, t)
        z = (math.sqrt(after) * (z - math.sqrt(1 - now) * eps) / math.sqrt(now) + math.sqrt(1 - after) * eps) / 2
    torch.testing.assert_close(changed, z, rtol=2e-5, atol=2e-5)
    assert steps == [(i, t) for i, (t, _, _) in enumerate(alpha_bars(3))]

    denoise = Denoiser(False)
    ended = sample_latents(denoise, ddim(), noise(), 4, 1.0, on_step=lambda i, t, z: z if i < 1 else None)
    assert len(denoise.calls) == 2 and torch.isfinite(ended).all()


BARE = 0.7


@pytest.mark.parametrize(("guidance", "relations"), [(7.5, 2.0), (1.0, 2.0), (3.0, 0.5), (7.5, 0.0)])
def test_relation_guidance_is_a_second_term_against_the_graph_without_its_relations(guidance, relations):
    """Against the formula, the three predictions in one call; nothing is asked for that has no part in it."""
    calls = []

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(len(z))
        known = {"null": null, "bare": lambda z, t: BARE * given(z, t), "given": given}
        asked = conditions(guidance, relations)
        return torch.cat([known[name](part, int(t)) for name, part in zip(asked, z.chunk(len(asked)), strict=True)])

    found = sample_latents(denoise, ddim(), noise().double(), 5, guidance, relation_guidance=relations)
    z = noise().double()
    for t, now, after in alpha_bars(5):
        full, without, empty = given(z, t), BARE * given(z, t), null(z, t)
        eps = empty + guidance * (full - empty) + relations * (full - without)
        z_0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
        z = math.sqrt(after) * z_0 + math.sqrt(1 - after) * eps
    torch.testing.assert_close(found, z, rtol=2e-5, atol=2e-5)
    assert calls == [2 * (1 + (guidance != 1) + (relations != 0))] * 5


class NoWaiting(TorchDispatchMode):
    """Raises where a value would be read back, or sizes depend on values; counts those that it allows."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select")

    def __init__(self, allow: bool = False) -> None:
        super().__init__()
        self.allow, self.reads = allow, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in self.READS:
            self.reads += 1
            assert self.allow, f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_within_the_loop_of_ddim_the_host_reads_no_tensor(kind):
    """Neither of the device nor of its own, which is more than is asked of it."""
    mode, scheduler = NoWaiting(), ddim(kind)

    def track(timesteps):
        with mode:
            yield from timesteps

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == ()
        return torch.tanh(z) * (1 + t / 1000)

    out = sample_latents(denoise, scheduler, noise(), 4, 7.5, track, relation_guidance=1.0, on_step=lambda i, t, z: z)
    assert torch.isfinite(out).all() and mode.reads == 0
    with pytest.raises(AssertionError, match="wait"), mode:
        noise().sum().item()


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_nor_does_the_unet_read_one(fused):
    """What would end a capture."""
    unet = toy_unet().eval()
    if fused:
        fuse(unet)
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 80, unet.config.cross_attention_dim)
    mask, t = torch.ones(2, 80, dtype=torch.bool), torch.tensor(500)
    with NoWaiting() as mode:
        out = unet(z, t, context, encoder_attention_mask=mask).sample
    assert mode.reads == 0 and out.shape == z.shape


def test_ddim_called_with_tensors_waits_six_times_a_step():
    """What the docstring says of the usual way, so that the test above is known to see it."""
    scheduler = ddim()
    scheduler.set_timesteps(4)
    with NoWaiting(allow=True) as mode:
        scheduler.step(noise(), scheduler.timesteps[1], noise(), eta=0.0)
    assert mode.reads == 6
