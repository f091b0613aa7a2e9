"""`group_norm_silu` and `geglu` against their pure-torch form: values, all gradients, and what else they promise."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import group_norm_layout, reference
from support.cases.function import compare, evaluate
from support.cases.graph import Tensors, assert_within_rule, randn

from sgg_fast import ops
from sgg_fast.ops import unet_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Images, spatial size, channels, groups. Stable Diffusion's C / G are 10, 20, 30, 40, 60 and 80.
NORMS = {
    "10": (2, (4, 5), 40, 4),
    "20": (1, (4, 4), 40, 2),
    "30": (1, (4, 3), 120, 4),
    "40": (2, (3, 3), 80, 2),
    "60": (1, (2, 3), 120, 2),
    "80": (1, (3, 5), 160, 2),
    "4": (1, (6, 6), 32, 8),
    "odd": (3, (3, 3), 21, 3),
    "one_channel": (2, (5, 3), 3, 3),
    "one_group": (2, (2, 2), 150, 1),
    "one_pixel": (2, (1, 1), 10, 1),
    "line": (1, (70,), 20, 2),
    "vector": (3, (), 20, 2),
    "no_image": (0, (2, 2), 20, 2),
}


def norm_inputs(name: str, dtype: torch.dtype = torch.float32) -> Tensors:
    images, spatial, channels, _ = NORMS[name]
    x = randn(0, images, channels, *spatial)
    x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    return {"x": x.to(dtype), "weight": (1 + 0.5 * randn(1, channels)).to(dtype), "bias": randn(2, channels).to(dtype)}


def norm_of(name: str, silu: bool = True, eps: float = 1e-5):
    return functools.partial(ops.group_norm_silu, num_groups=NORMS[name][3], eps=eps, silu=silu)


def renamed(run):
    """`run` with its parameters by the names of the inputs here."""
    return lambda x, weight, bias: run(x, weight, bias)


@pytest.fixture
def split(monkeypatch) -> None:
    """Every image is a large one, of several chunks."""
    monkeypatch.setattr(group_norm_layout, "ONE_PASS_PIXELS", 0)
    monkeypatch.setattr(group_norm_layout, "CHUNK_PIXELS", 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_group_norm(name, dtype, device, poisoned, launched):
    compare(renamed(norm_of(name)), norm_inputs(name, dtype), device)
    if NORMS[name][0] and name != "one_group":
        assert launched == ["group_norm_silu_fwd_kernel", "group_norm_silu_bwd_kernel", "column_sum_kernel"]


def shifted_inputs(name: str, dtype: torch.dtype, size: float = 1.0) -> Tensors:
    """`norm_inputs` and a shift in fp32, as a time embedding gives one under autocast."""
    images, _, channels, _ = NORMS[name]
    return norm_inputs(name, dtype) | {"shift": size * randn(3, images, channels)}


def with_shift(name: str):
    """The operator by the names of the inputs here."""
    run = norm_of(name)
    return lambda x, weight, bias, shift: run(x, weight, bias, shift_BC=shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_shift_costs_no_launch(name, dtype, device, poisoned, launched):
    compare(with_shift(name), shifted_inputs(name, dtype), device)
    if NORMS[name][0] and name != "one_group":
        assert launched == ["group_norm_silu_fwd_kernel", "group_norm_silu_bwd_kernel", "column_sum_kernel"]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.usefixtures("split")
def test_a_shift_of_large_images(name, device, poisoned):
    compare(with_shift(name), shifted_inputs(name, torch.float32), device)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_a_large_shift_loses_no_more_than_adding_it(size, device, poisoned):
    """By the rule: the reference adds the shift in fp32."""
    compare(with_shift("10"), shifted_inputs("10", torch.float32, size), device)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.usefixtures("split")
def test_group_norm_of_large_images(name, device, poisoned, launched):
    compare(renamed(norm_of(name)), norm_inputs(name, torch.bfloat16), device)
    if NORMS[name][0]:
        stem = "group_norm_silu"
        forward = [f"{stem}_{part}_kernel" for part in ("stats", "merge", "apply")]
        backward = [f"{stem}_bwd_{part}_kernel" for part in ("stats", "merge", "apply")]
        assert launched == [*forward, *backward, "column_sum_kernel"]


def test_the_split_begins_above_1024_pixels(device, launched):
    """Where a whole group fits in a program; a group of more than 128 channels never does."""
    layout = group_norm_layout.NormLayout
    assert [layout(2, pixels, 320, 10).whole for pixels in (1024, 1025)] == [40, 0]
    assert [layout(2, 16, 32 * size, size).whole for size in (10, 20, 30, 40, 60, 80)] == [40, 40, 120, 40, 120, 80]
    assert [layout(2, 16, 4 * size, size).whole for size in (128, 129)] == [128, 0]


@pytest.mark.parametrize("name", ["10", "odd", "line"])
def test_without_silu(name, device, poisoned):
    found = compare(renamed(norm_of(name, silu=False)), norm_inputs(name), device)
    x, weight, bias = (t.to(device) for t in norm_inputs(name).values())
    torch.testing.assert_close(found["out"], F.group_norm(x, NORMS[name][3], weight, bias), rtol=1e-4, atol=1e-5)


def test_against_torchs_own(device):
    """The reference is ours; torch's own layers are somebody else's."""
    inputs = {k: t.to(device) for k, t in norm_inputs("30").items()}
    found = evaluate("triton", renamed(norm_of("30")), inputs)
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
    found = evaluate("triton", renamed(norm_of("10", silu=False)), {k: v.to(device) for k, v in leaves.items()})["out"]
    grouped = x.double().view(2, 4, -1)
    off = grouped - grouped.mean(-1, keepdim=True)
    want = (off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view_as(x)
    assert (found.cpu().double() - want).abs().max() < 1e-4


def test_an_outlier_in_the_first_pixel(device):
    """No pixel serves as a pivot whose squared distance the others would drown in."""
    inputs = norm_inputs("10")
    inputs["x"][:, :, 0, 0] = 1e4
    compare(renamed(norm_of("10")), inputs, device)


@pytest.mark.parametrize("name", ["10", "line"])
def test_layouts_of_the_input(name, device, poisoned):
    """Whatever the memory order, the values are the same; the result is channels last."""
    inputs = {k: t.to(device) for k, t in norm_inputs(name).items()}
    found = evaluate("triton", renamed(norm_of(name)), inputs)
    for view in (torch.Tensor.contiguous, lambda x: torch.stack([x, x], -1)[..., 0]):
        again = evaluate("triton", renamed(norm_of(name)), {**inputs, "x": view(inputs["x"])})
        for key, value in found.items():
            assert torch.equal(value, again[key]), key
    if name == "10":
        assert found["out"].is_contiguous(memory_format=torch.channels_last)
        assert found["grad x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [True, False])
def test_autocast_dtypes(silu, device, poisoned):
    """bf16 images, fp32 parameters: each gradient in the dtype of its input."""
    inputs = {k: t.to(device) for k, t in norm_inputs("20").items()}
    mixed = {**inputs, "x": inputs["x"].bfloat16()}
    run = renamed(norm_of("20", silu))
    found, low = (evaluate(backend, run, mixed) for backend in ("triton", "reference"))
    assert [found[f"grad {name}"].dtype for name in inputs] == [torch.bfloat16, torch.float32, torch.float32]
    assert_within_rule(found, low, evaluate("reference", run, {k: t.double() for k, t in mixed.items()}))


@pytest.mark.parametrize("large", [False, True])
def test_same_bits_twice_and_images_apart(large, device, request):
    """Determinism; and an image's result does not depend on its neighbours, one of them NaN."""
    if large:
        request.getfixturevalue("split")
    inputs = {k: t.to(device) for k, t in norm_inputs("10").items()}
    first, again = (evaluate("triton", renamed(norm_of("10")), inputs) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    inputs["x"][1] = float("nan")
    beside = evaluate("triton", renamed(norm_of("10")), inputs)
    assert torch.equal(beside["out"][0], first["out"][0]) and torch.equal(beside["grad x"][0], first["grad x"][0])
    assert beside["out"][1].isnan().all() and beside["grad weight"].isnan().all()


GATES = {"plain": (5, 66), "wide": (3, 2 * 300), "odd": (7, 2), "batch": (2, 3, 20), "vector": (8,), "empty": (0, 12)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_geglu(name, dtype, device, poisoned, launched):
    compare(ops.geglu, {"x": (2 * randn(0, *GATES[name])).to(dtype)}, device)
    assert launched == ([] if name == "empty" else ["geglu_fwd_kernel", "geglu_bwd_kernel"])


def test_geglu_is_exact_and_not_the_tanh_form(device):
    """Against math.erf's values by torch in float64: the tanh form is off by up to 5e-4."""
    gate = torch.linspace(-6, 6, 97)
    x = torch.cat([torch.ones(97), gate])[None].to(device)
    found = evaluate("triton", ops.geglu, {"x": x})["out"][0].cpu().double()
    exact = 0.5 * gate.double() * (1 + torch.erf(gate.double() / 2**0.5))
    assert (found - exact).abs().max() < 2e-6
    assert (F.gelu(gate, approximate="tanh").double() - exact).abs().max() > 1e-4


def test_geglu_of_strided_and_extreme_inputs(device, poisoned):
    wide = torch.full((4, 71), float("nan"))
    wide[:, 3:69] = 2 * randn(0, 4, 66)
    wide[0, 36:40] = torch.tensor([1e4, -1e4, 0.0, -0.0])
    found = compare(ops.geglu, {"x": wide[:, 3:69]}, device)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ["one_channel"])
def test_opcheck_group_norm(name, shifted, device):
    x, weight, bias = (t.to(device).requires_grad_() for t in norm_inputs(name).values())
    x_BSC = x.detach().flatten(2).transpose(1, 2).requires_grad_()
    shift = randn(3, *x.shape[:2]).to(device).requires_grad_() if shifted else None
    args = (x_BSC, shift, weight, bias, NORMS[name][3], 1e-5, True)
    torch.library.opcheck(unet_kernels.group_norm_silu.library, args)
    out, *stats = unet_kernels.group_norm_silu(*args)
    out, x_BSC, *given = (t.detach() for t in (out, x_BSC, weight, bias, *stats))
    for beside in (None, out):
        args = (out, x_BSC, beside, *given, NORMS[name][3], True)
        torch.library.opcheck(unet_kernels.group_norm_silu_bwd.library, args)


def test_opcheck_geglu(device):
    x = randn(0, 3, 20).to(device)
    torch.library.opcheck(unet_kernels.geglu.library, (x.requires_grad_(),))
    torch.library.opcheck(unet_kernels.geglu_bwd.library, (randn(1, 3, 10).to(device), x.detach()))


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck_of_the_references(silu):
    x, weight, bias = randn(0, 2, 6, 3).double(), randn(1, 6).double(), randn(2, 6).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: reference.group_norm_silu(*t, 2, 1e-5, silu), leaves)
    leaves.append(randn(4, 2, 6).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: reference.group_norm_silu(*t[:3], 2, 1e-5, silu, t[3]), leaves)
    assert torch.autograd.gradcheck(reference.geglu, [randn(3, 2, 8).double().requires_grad_()])


def test_refusals():
    x, one = torch.zeros(2, 6, 3), torch.ones(6)
    for args, message in (
        ((x, one[:5], one, 2, 1e-5), r"weight and bias must be \[6\]"),
        ((x, one, one, 4, 1e-5), "4 groups do not divide 6"),
        ((x, one, one, 0, 1e-5), "0 groups"),
        ((x[:, :, :0], one, one, 2, 1e-5), "must have a pixel"),
        ((x, one.to("meta"), one, 2, 1e-5), "all tensors must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"group_norm_silu: .*{message}"):
            ops.group_norm_silu(*args)
    with pytest.raises(ValueError, match="geglu: the last dimension must be even"):
        ops.geglu(x)
