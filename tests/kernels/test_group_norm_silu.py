"""`group_norm_silu` against its pure-torch form and torch's own: values, all gradients, shifts, sizes and layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support.cases.function import compare, evaluate
from support.cases.graph import randn
from support.kernels.unet import DTYPES, NORMS, norm_inputs, norm_of, shifted_inputs, split_images


@pytest.fixture
def split(monkeypatch) -> None:
    """Every image is a large one, of several chunks."""
    split_images(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_group_norm(name, dtype, device, poisoned, launched):
    compare(norm_of(name), norm_inputs(name, dtype), device)
    if NORMS[name][0] and name != "one_group":
        assert launched == ["group_norm_silu_fwd_kernel", "group_norm_silu_bwd_kernel", "column_sum_kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_shift_costs_no_launch(name, dtype, device, poisoned, launched):
    compare(norm_of(name), shifted_inputs(name, dtype), device)
    if NORMS[name][0] and name != "one_group":
        assert launched == ["group_norm_silu_fwd_kernel", "group_norm_silu_bwd_kernel", "column_sum_kernel"]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.usefixtures("split")
def test_a_shift_of_large_images(name, device, poisoned):
    compare(norm_of(name), shifted_inputs(name, torch.float32), device)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_a_large_shift_loses_no_more_than_adding_it(size, device, poisoned):
    """By the rule: the reference adds the shift in fp32."""
    compare(norm_of("10"), shifted_inputs("10", torch.float32, size), device)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.usefixtures("split")
def test_group_norm_of_large_images(name, device, poisoned, launched):
    compare(norm_of(name), norm_inputs(name, torch.bfloat16), device)
    if NORMS[name][0]:
        stem = "group_norm_silu"
        forward = [f"{stem}_{part}_kernel" for part in ("stats", "merge", "apply")]
        backward = [f"{stem}_bwd_{part}_kernel" for part in ("stats", "merge", "apply")]
        assert launched == [*forward, *backward, "column_sum_kernel"]


@pytest.mark.parametrize("name", ["10", "odd", "line"])
def test_without_silu(name, device, poisoned):
    found = compare(norm_of(name, silu=False), norm_inputs(name), device)
    x, weight, bias = (t.to(device) for t in norm_inputs(name).values())
    torch.testing.assert_close(found["out"], F.group_norm(x, NORMS[name][3], weight, bias), rtol=1e-4, atol=1e-5)


def test_against_torchs_own(device):
    """The reference is ours; torch's own layers are somebody else's."""
    inputs = {k: t.to(device) for k, t in norm_inputs("30").items()}
    found = evaluate("triton", norm_of("30"), inputs)
    want = evaluate("reference", lambda x, weight, bias: F.silu(F.group_norm(x, 4, weight, bias)), inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("large", [False, True])
def test_statistics_at_a_large_mean(large, device, request):
    """Mean 1e3, deviation 1: within a few roundings of the inputs' size; E[x^2] - E[x]^2 would be off by the deviation.

    Half a unit in the last place of 1e3 is 3e-5.
    """
    if large:
        request.getfixturevalue("split")
    x = 1e3 + randn(0, 2, 40, 7, 5)
    ones, zeros = torch.ones(40), torch.zeros(40)
    leaves = {"x": x, "weight": ones, "bias": zeros}
    found = evaluate("triton", norm_of("10", silu=False), {k: v.to(device) for k, v in leaves.items()})["out"]
    grouped = x.double().view(2, 4, -1)
    off = grouped - grouped.mean(-1, keepdim=True)
    want = (off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view_as(x)
    assert (found.cpu().double() - want).abs().max() < 1e-4


def test_an_outlier_in_the_first_pixel(device):
    """No pixel serves as a pivot whose squared distance the others would drown in."""
    inputs = norm_inputs("10")
    inputs["x"][:, :, 0, 0] = 1e4
    compare(norm_of("10"), inputs, device)


@pytest.mark.parametrize("name", ["10", "line"])
def test_layouts_of_the_input(name, device, poisoned):
    """Whatever the memory order, the values are the same; the result is channels last."""
    inputs = {k: t.to(device) for k, t in norm_inputs(name).items()}
    found = evaluate("triton", norm_of(name), inputs)
    for view in (torch.Tensor.contiguous, lambda x: torch.stack([x, x], -1)[..., 0]):
        again = evaluate("triton", norm_of(name), {**inputs, "x": view(inputs["x"])})
        for key, value in found.items():
            assert torch.equal(value, again[key]), key
    if name == "10":
        assert found["out"].is_contiguous(memory_format=torch.channels_last)
        assert found["grad x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("large", [False, True])
def test_same_bits_twice_and_images_apart(large, device, request):
    """Determinism; and an image's result does not depend on its neighbours, one of them NaN."""
    if large:
        request.getfixturevalue("split")
    inputs = {k: t.to(device) for k, t in norm_inputs("10").items()}
    first, again = (evaluate("triton", norm_of("10"), inputs) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    inputs["x"][1] = float("nan")
    beside = evaluate("triton", norm_of("10"), inputs)
    assert torch.equal(beside["out"][0], first["out"][0]) and torch.equal(beside["grad x"][0], first["grad x"][0])
    assert beside["out"][1].isnan().all() and beside["grad weight"].isnan().all()
