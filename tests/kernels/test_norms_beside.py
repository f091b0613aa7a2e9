"""Norms whose backward adds the gradient beside them, the residual sum's LayerNorm, and sums for many norms at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import add_layer_norm as kernels
from sgg_kernels import group_norm_layout, reference
from support.cases.function import compare, evaluate
from support.cases.graph import Tensors, randn

from sgg_fast import ops
from sgg_fast.ops import norm_kernels, unet_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5

# Rows and columns. Stable Diffusion's widths are 320, 640 and 1280; a tile has 2,048 elements.
ROWS = {"plain": (5, 40), "several_tiles": (37, 96), "wide": (3, 1280), "odd": (9, 21), "one": (1, 1), "none": (0, 8)}
FORMS = {"alone": (), "residual": ("residual",), "late": ("late",), "both": ("residual", "late")}


def inputs_of(name: str, form: str, dtype: torch.dtype = torch.float32) -> Tensors:
    num_rows, width = ROWS[name]
    made = {"x": randn(0, num_rows, width), "weight": 1 + 0.5 * randn(1, width), "bias": randn(2, width)}
    extra = {"residual": randn(3, num_rows, width), "late": randn(4, width)}
    return {k: t.to(dtype) for k, t in (made | {k: extra[k] for k in FORMS[form]}).items()}


def layer_norm(x, weight, bias, residual=None, late=None, slot=None):
    return ops.add_layer_norm(x, weight, bias, EPS, residual, late, slot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_add_layer_norm(name, form, dtype, device, poisoned, launched):
    compare(layer_norm, inputs_of(name, form, dtype), device)
    if ROWS[name][0]:
        assert launched == ["add_layer_norm_fwd_kernel", "add_layer_norm_bwd_kernel", "column_sum_kernel"]


def test_more_rows_than_programs(device, poisoned, monkeypatch):
    """A program walks several tiles, the last one partial; every number of programs gives the gradients."""
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "TILE", 256)
    assert kernels.programs_of(37, 96) == (2, 20)
    compare(layer_norm, inputs_of("several_tiles", "both"), device)


def test_against_torchs_own(device):
    """The reference is ours; torch's own layer is somebody else's."""
    inputs = {k: t.to(device) for k, t in inputs_of("several_tiles", "both").items()}

    def stock(x, weight, bias, residual, late):
        total = x + residual + late
        return F.layer_norm(total, total.shape[-1:], weight, bias, EPS), total

    found, want = evaluate("triton", layer_norm, inputs), evaluate("reference", stock, inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5)


def test_statistics_at_a_large_mean(device):
    """Mean 1e3, deviation 1: half a unit in the last place of 1e3 is 3e-5."""
    x = (1e3 + randn(0, 7, 320)).to(device)
    ones, zeros = torch.ones(320, device=device), torch.zeros(320, device=device)
    found = evaluate("triton", layer_norm, {"x": x, "weight": ones, "bias": zeros})["output 0"]
    assert (found.double() - F.layer_norm(x.double(), (320,), eps=EPS)).abs().max() < 1e-4


def test_autocast_dtypes_and_batches(device, poisoned):
    """bf16 rows [.., D] of any layout, fp32 parameters: each gradient in the dtype and shape of its input."""
    inputs = {k: t.to(device) for k, t in inputs_of("several_tiles", "both").items()}
    stream = ("x", "residual")
    mixed = {k: t.bfloat16().view(37, 1, 96) if k in stream else t for k, t in inputs.items()}
    mixed["x"] = torch.stack([mixed["x"]] * 2, -1)[..., 0]
    found = compare(layer_norm, mixed, device)
    for name, value in mixed.items():
        assert (found[f"grad {name}"].dtype, found[f"grad {name}"].shape) == (value.dtype, value.shape)


def test_same_bits_twice_and_rows_apart(device):
    inputs = {k: t.to(device) for k, t in inputs_of("several_tiles", "both").items()}
    first, again = (evaluate("triton", layer_norm, inputs) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    inputs["x"][1] = float("nan")
    beside, others = evaluate("triton", layer_norm, inputs), torch.arange(37, device=device) != 1
    for key in ("output 0", "output 1", "grad x"):
        assert torch.equal(beside[key][others], first[key][others]) and beside[key][1].isnan().all(), key


def group_norm(x, weight, bias, shift=None, slot=None):
    return ops.group_norm_silu_beside(x, weight, bias, 4, EPS, shift_BC=shift, slot=slot)


def image_inputs(dtype: torch.dtype, shifted: bool) -> Tensors:
    x = randn(0, 2, 40, 5, 4).to(memory_format=torch.channels_last)
    made = {"x": x, "weight": 1 + 0.5 * randn(1, 40), "bias": randn(2, 40)}
    return {k: t.to(dtype) for k, t in made.items()} | ({"shift": randn(3, 2, 40)} if shifted else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_group_norm_beside(large, shifted, dtype, device, poisoned, launched, monkeypatch):
    if large:
        monkeypatch.setattr(group_norm_layout, "ONE_PASS_PIXELS", 0)
        monkeypatch.setattr(group_norm_layout, "CHUNK_PIXELS", 4)
    inputs = image_inputs(dtype, shifted)
    found = compare(group_norm, inputs, device)
    assert torch.equal(found["output 1"], inputs["x"].to(device))
    assert len(launched) == (7 if large else 3), "the sum of the two gradients is no launch"


@pytest.mark.parametrize("op", [layer_norm, group_norm])
def test_what_goes_past_the_norm_alone(op, device):
    """Only one of the two outputs is used: the other has no gradient, not a gradient of 0 from memory."""
    inputs = image_inputs(torch.float32, False) if op is group_norm else inputs_of("plain", "both")
    inputs = {k: t.to(device) for k, t in inputs.items()}
    compare(lambda **given: (op(**given)[0] * 1,), inputs, device)
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    ops.use_kernels("triton")
    try:
        grads = torch.autograd.grad(op(**leaves)[1].sum(), list(leaves.values()), allow_unused=True)
    finally:
        ops.use_kernels("auto")
    expected = {"x": 1.0, "residual": 1.0, "late": float(ROWS["plain"][0])}
    for name, grad in zip(leaves, grads, strict=True):
        want = expected.get(name, 0.0)
        assert want == 0.0 if grad is None else torch.equal(grad, torch.full_like(grad, want)), name


def test_sums_of_many_norms(device, launched):
    """Each parameter's gradient has the bits of its own norm's sum; norms with as many rows share a launch."""
    sums, bits = ops.ColumnSums(), {}
    weights = [torch.nn.Parameter(1 + 0.5 * randn(i, 40).to(device)) for i in range(4)]
    biases = [torch.nn.Parameter(randn(9 + i, 40).to(device)) for i in range(4)]
    late = torch.nn.Parameter(randn(20, 40).to(device))
    x, stream = randn(30, 2, 40, 5, 4).to(device), randn(31, 40, 40).to(device)

    def run() -> list[torch.Tensor]:
        first, past = ops.group_norm_silu_beside(x, weights[0], biases[0], 4, EPS, slot=sums.of(weights[0], biases[0]))
        second, _ = ops.group_norm_silu_beside(
            first + past, weights[1], biases[1], 2, EPS, slot=sums.of(weights[1], biases[1])
        )
        rows, total = ops.add_layer_norm(
            stream, weights[2], biases[2], EPS, stream, late, sums.of(weights[2], biases[2], late)
        )
        rows, _ = ops.add_layer_norm(rows, weights[3], biases[3], EPS, total, slot=sums.of(weights[3], biases[3]))
        return torch.autograd.grad((second.square().sum() + rows.square().sum()), [*weights, *biases, late])

    ops.use_kernels("triton")
    try:
        bits["apart"] = run()
        assert launched.count("column_sum_kernel") == 4
        launched.clear()
        sums.begin([*weights, *biases, late])
        bits["together"] = run()
        assert launched.count("column_sum_kernel") == 2, "one of two images' rows, one of the LayerNorms' programs"
        sums.end()
        assert sums.of(weights[0]) is None
    finally:
        ops.use_kernels("auto")
    for apart, together in zip(bits["apart"], bits["together"], strict=True):
        assert torch.equal(apart, together) and together.storage_offset() * together.element_size() % 16 == 0


def test_sums_leave_out_what_is_not_trained(device):
    sums, weight, bias = ops.ColumnSums(), torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.zeros(8))
    bias.requires_grad_(False)
    sums.begin([weight, bias])
    assert sums.of(weight) is not None and sums.of(weight, bias) is None
    with torch.no_grad():
        sums.begin([weight, bias])
    assert sums.of(weight) is None
    sums.begin([])
    assert sums.token is None


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, device):
    inputs = {k: t.to(device).requires_grad_() for k, t in inputs_of("odd", form).items()}
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    args = (x, inputs.get("residual"), inputs.get("late"), weight, bias, EPS)
    torch.library.opcheck(norm_kernels.add_layer_norm.library, args)
    out, total, mean, rstd = (t.detach() for t in norm_kernels.add_layer_norm(*args))
    total = total if total.numel() else x.detach()
    for beside in (None, out):
        given = (out, beside, total, weight.detach(), mean, rstd, "late" in inputs)
        torch.library.opcheck(norm_kernels.add_layer_norm_bwd.library, given)


def test_opcheck_of_the_second_stage(device):
    torch.library.opcheck(unet_kernels.column_sum.library, (randn(0, 5, 7).to(device), torch.bfloat16))


def test_gradcheck_of_the_reference():
    shapes = (3, 5), (5,), (5,), (3, 5), (5,)
    x, weight, bias, residual, late = (randn(i, *s).double().requires_grad_() for i, s in enumerate(shapes))
    run = lambda *t: reference.add_layer_norm(*t[:3], EPS, *t[3:])  # noqa: E731
    assert torch.autograd.gradcheck(run, [x, weight, bias, residual, late])


def test_refusals():
    x, one = torch.zeros(2, 6), torch.ones(6)
    for args, message in (
        ((x, one[:5], one, EPS), r"weight, bias and late must be \[6\]"),
        ((x, one, one, EPS, x[:1]), "the residual must be torch.float32"),
        ((x, one, one, EPS, x.bfloat16()), "the residual must be torch.float32"),
        ((torch.zeros(2, 8193), one, one, EPS), "from 1 to 8192"),
        ((x, one.to("meta"), one, EPS), "all tensors must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
            ops.add_layer_norm(*args)
