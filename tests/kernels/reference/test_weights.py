"""Weights in their three forms: what is read is what was written, rounded as the form says."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels.reference.weights import Weights, read_weights, write_weights

STEP = torch.tensor([3], dtype=torch.int32)
AWKWARD = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2**-23, 1 - 2**-24, 1.00390625, -3.4e38, 3.3895313e38, 1e-45, -1e-39,
                        2.0**-126, torch.inf, -torch.inf, 3.14159, 65504.5])  # fmt: skip


def weights(form: str, num: int, seed: int = 5) -> Weights:
    param = torch.zeros(num, dtype=torch.float32 if form == "fp32" else torch.bfloat16)
    return Weights(param, torch.zeros(num, dtype=torch.int16) if form == "split" else None, seed)


def drawn(num: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, generator=generator) * torch.exp(10 * torch.randn(num, generator=generator))


@pytest.mark.parametrize("form", ["fp32", "split"])
def test_fp32_comes_back_bit_for_bit(form):
    """The rest of the buffer is left alone; the bf16 half is the nearest bf16 number."""
    wide = torch.cat([AWKWARD, drawn(1000)])
    given, part = weights(form, len(wide) + 20), slice(10, len(wide) + 10)
    write_weights(given, part, wide, STEP)
    assert torch.equal(read_weights(given, part).view(torch.int32), wide.view(torch.int32))
    assert not given.param[:10].any() and not given.param[-10:].any()
    if form == "split":
        ties = (wide.view(torch.int32) & 0xFFFF) == 0x8000  # half-way up: any of both is nearest
        assert torch.equal(given.param[part][~ties], wide.bfloat16()[~ties])


@pytest.mark.parametrize("form", ["fp32", "split", "rounded"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000], ids=["gpu", "negative", "cpu"])
def test_a_nan_stays_one(form, bits):
    given = weights(form, 4)
    write_weights(given, slice(1, 2), torch.tensor([bits], dtype=torch.int32).view(torch.float32), STEP)
    assert (
        given.param.isnan().tolist() == read_weights(given, slice(0, 4)).isnan().tolist() == [False, True, False, False]
    )


def test_rounding_takes_a_neighbour_and_is_right_on_average():
    """bf16 alone: a number of bf16 stays; a quarter of the way up, a quarter of the elements go up, to 5 sigma."""
    num = 4096
    low, high = 1.0, 1 + 2**-7
    for share in (0.0, 0.25, 0.9):
        given = weights("rounded", num)
        write_weights(given, slice(0, num), torch.full((num,), low + share * (high - low)), STEP)
        found = read_weights(given, slice(0, num))
        assert ((found == low) | (found == high)).all()
        up = (found == high).double().mean()
        assert abs(up - share) <= 5 * (share * (1 - share) / num) ** 0.5
    given = weights("rounded", len(AWKWARD))
    write_weights(given, slice(0, len(AWKWARD)), AWKWARD, STEP)
    infinite = AWKWARD.isinf()
    assert torch.equal(given.param[infinite].float(), AWKWARD[infinite])


def test_rounding_follows_seed_step_and_place_in_the_buffer():
    wide = torch.full((256,), 1 + 2**-8)

    def rounded(seed: int = 5, step: int = 3, first: int = 0) -> torch.Tensor:
        given, part = weights("rounded", 512, seed), slice(first, first + 256)
        write_weights(given, part, wide, torch.tensor([step], dtype=torch.int32))
        return given.param[part]

    assert torch.equal(rounded(), rounded())
    for other in (rounded(seed=6), rounded(step=4), rounded(first=256)):
        assert not torch.equal(rounded(), other)
