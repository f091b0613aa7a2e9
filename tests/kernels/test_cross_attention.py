"""`cross_attention` against a formula in float64 by loops, against its pure-torch form, and what else it promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import cross_attention as kernels
from sgg_kernels import reference
from support.cases.function import Blocked
from support.cases.graph import Tensors, randn

from benchmarks.aot.compare import compare_norms as assert_within_rule
from sgg_fast import ops
from sgg_fast.ops import unet_kernels, unet_ops

DTYPES = (torch.float16, torch.bfloat16)

# Images, queries, keys, heads, width of a head. Stable Diffusion's widths are 40, 80, 160; its context has 80 tokens.
SHAPES = {
    "40": (2, 40, 80, 1, 40),
    "64": (1, 33, 80, 2, 64),
    "80": (1, 64, 80, 1, 80),
    "160": (1, 32, 80, 1, 160),
    "keys 77": (2, 17, 77, 1, 40),
    "keys 128": (1, 16, 128, 1, 16),
    "keys 112": (1, 16, 112, 1, 24),
    "one key": (2, 5, 1, 2, 8),
    "odd": (3, 7, 19, 3, 13),
    "one query": (1, 1, 80, 1, 40),
    "several chunks": (1, 200, 20, 1, 16),
    "no query": (2, 0, 16, 1, 16),
    "no image": (0, 4, 16, 1, 16),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Small images have several chunks of queries, each of more than one block."""
    monkeypatch.setattr(kernels, "PROGRAMS", 9)


def inputs_of(name: str, dtype: torch.dtype = torch.float16) -> tuple[Tensors, torch.Tensor]:
    """(q, k and v, the latter as slices of a wider GEMM's rows, bias with a masked third)"""
    images, queries, keys, heads, width = SHAPES[name]
    q = randn(0, images, queries, heads, width)
    both = randn(1, images, keys, 3 * heads * width)
    k, v = (both[..., n * heads * width :][..., : heads * width].unflatten(-1, (heads, width)) for n in (0, 2))
    bias = 0.5 * randn(2, images, keys)
    bias[:, 1 + 2 * keys // 3 :] = -10000.0
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}, bias


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, g: torch.Tensor) -> Tensors:
    """Output and gradients by their formulas, in float64, one query of one head at a time."""
    q, k, v, bias, g = (x.double() for x in (q, k, v, bias, g))
    scale = 1 / math.sqrt(q.shape[-1])
    out, grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, q, k, v))
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for s in range(q.shape[1]):
                logits = scale * (k[b, :, h] @ q[b, s, h]) + bias[b]
                p = (logits - logits.max()).exp()
                p = p / p.sum()
                out[b, s, h] = p @ v[b, :, h]
                w = v[b, :, h] @ g[b, s, h]
                ds = scale * p * (w - p @ w)
                grad_q[b, s, h] = ds @ k[b, :, h]
                grad_k[b, :, h] += ds[:, None] * q[b, s, h]
                grad_v[b, :, h] += p[:, None] * g[b, s, h]
    return {"out": out, "grad q": grad_q, "grad k": grad_k, "grad v": grad_v}


def evaluate(backend: str, inputs: Tensors, bias: torch.Tensor, g: torch.Tensor, run=ops.cross_attention) -> Tensors:
    ops.use_kernels(backend)
    try:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = run(*leaves.values(), bias)
        grads = torch.autograd.grad(out, list(leaves.values()), g.to(out.dtype))
    finally:
        ops.use_kernels("auto")
    return {"out": out.detach()} | {f"grad {name}": x for name, x in zip(leaves, grads, strict=True)}


def compare(inputs: Tensors, bias: torch.Tensor, device: str) -> Tensors:
    """The kernels against the formulas, by the tolerance rule; returns what the kernels gave."""
    inputs, bias = {name: x.to(device) for name, x in inputs.items()}, bias.to(device)
    g = randn(3, *inputs["q"].shape).to(inputs["q"])
    found, low = (evaluate(backend, inputs, bias, g) for backend in ("triton", "reference"))
    want = exact(*inputs.values(), bias, g)
    assert_within_rule(found, low, want)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_formulas(name, dtype, device, poisoned, launched):
    compare(*inputs_of(name, dtype), device)
    if 0 not in SHAPES[name]:
        stem = "cross_attention"
        assert launched == [f"{stem}_{part}_kernel" for part in ("fwd", "bwd_q", "bwd_kv")] + ["column_sum_kernel"]


@pytest.mark.parametrize("name", ["40", "odd", "keys 77"])
def test_against_sdpa(name, device):
    """The reference is ours; torch's attention is somebody else's."""
    inputs, bias = inputs_of(name)
    inputs, bias = {k: x.to(device) for k, x in inputs.items()}, bias.to(device)

    def sdpa(q, k, v, bias):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, bias[:, None, None].to(q)).transpose(1, 2)

    g = randn(3, *inputs["q"].shape).to(device)
    found = evaluate("triton", inputs, bias, g)
    torch.testing.assert_close(found, evaluate("reference", inputs, bias, g, sdpa), rtol=5e-3, atol=2e-3)


def test_layouts(device, poisoned):
    """Heads before rows, and a gradient that is expanded: copied, with the same values."""
    inputs, bias = inputs_of("40")
    inputs, bias = {k: x.to(device) for k, x in inputs.items()}, bias.to(device)
    g = randn(3, 1, 1, 1, 40).to(device).expand(inputs["q"].shape)
    found = evaluate("triton", inputs, bias, g)
    moved = {k: x.transpose(1, 2).contiguous().transpose(1, 2) for k, x in inputs.items()}
    wide = torch.stack([bias, bias], -1)[..., 0]
    again = evaluate("triton", moved, wide, g.contiguous())
    assert all(torch.equal(x, again[k]) for k, x in found.items())


def test_masked_keys_get_nothing_and_give_nothing(device):
    inputs, bias = inputs_of("40", torch.bfloat16)
    first = compare(inputs, bias, device)
    shut = (bias < -1e3).to(device)
    assert shut.any() and (first["grad k"][shut] == 0).all() and (first["grad v"][shut] == 0).all()
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in ("k", "v"):
        changed[name][shut.cpu()] = 77.0
    again = compare(changed, bias, device)
    assert torch.equal(again["out"], first["out"]) and torch.equal(again["grad q"], first["grad q"])


@pytest.mark.parametrize("size", [60.0, 1e4])
def test_large_scores(size, device, poisoned):
    """The row's maximum is taken off, so nothing overflows; -inf shuts a key out, too."""
    inputs, bias = inputs_of("odd")
    bias[0, 3:] = -math.inf
    compare({"q": size * inputs["q"], "k": inputs["k"], "v": inputs["v"]}, bias, device)


def test_same_bits_twice_and_images_apart(device):
    inputs, bias = inputs_of("40", torch.bfloat16)
    inputs, bias = {k: x.to(device) for k, x in inputs.items()}, bias.to(device)
    g = randn(3, *inputs["q"].shape).to(device)
    first, again = (evaluate("triton", inputs, bias, g) for _ in range(2))
    assert all(torch.equal(x, again[k]) for k, x in first.items())
    spoiled = {k: x.clone() for k, x in inputs.items()}
    spoiled["q"][1] = torch.nan
    beside = evaluate("triton", spoiled, bias, g)
    assert all(torch.equal(x[0], first[k][0]) for k, x in beside.items()) and beside["out"][1].isnan().all()


def test_parts_cover_every_number_with_little_waste():
    for num in range(1, 161):
        found = kernels.parts(num)
        assert [start for start, _ in found] == [sum(s for _, s in found[:i]) for i in range(len(found))]
        assert 0 <= sum(size for _, size in found) - num < 16 and {size for _, size in found} <= {16, 32}


def test_what_the_kernel_does_not_take_runs_as_the_reference(device, launched):
    """More keys, wider heads, and fp32."""
    for keys, width, dtype, reason in (
        (129, 40, torch.bfloat16, "129 keys"),
        (80, 161, torch.float16, "width 161"),
        (80, 40, torch.float32, "float32"),
    ):
        assert reason in unet_ops.why_no_kernel(keys, width, dtype)
    assert unet_ops.why_no_kernel(128, 160, torch.float16) is None
    inputs, bias = inputs_of("odd", torch.float32)
    compare(inputs, bias, device)
    assert launched == []


def test_opcheck(device):
    inputs, bias = inputs_of("odd")
    args = [x.to(device) for x in inputs.values()]
    torch.library.opcheck(
        unet_kernels.cross_attention.library, (*(x.requires_grad_() for x in args), bias.to(device), 0.3)
    )
    args = [x.detach() for x in args]
    out, lse = unet_kernels.cross_attention(*args, bias.to(device), 0.3)
    torch.library.opcheck(unet_kernels.cross_attention_bwd.library, (out, *args, bias.to(device), lse, 0.3))


def test_gradcheck_of_the_reference():
    leaves = [randn(i, 2, n, 2, 4).double().requires_grad_() for i, n in enumerate((3, 5, 5))]
    bias = randn(4, 2, 5).double()
    assert torch.autograd.gradcheck(lambda *x: reference.cross_attention(*x, bias, 0.7), leaves)


def test_undefined_gradients_and_what_has_no_derivative(device):
    inputs, bias = inputs_of("odd")
    leaves, bias = [x.to(device).requires_grad_() for x in inputs.values()], bias.to(device)
    ops.use_kernels("triton")
    try:
        out, lse = unet_kernels.cross_attention(*leaves, bias, 0.3)
        assert out.requires_grad and not lse.requires_grad

        assert torch.autograd.grad(Blocked.apply(out).sum(), leaves, allow_unused=True) == (None,) * 3
        with pytest.raises(RuntimeError, match="cross_attention has no second derivative"):
            torch.autograd.grad(ops.cross_attention(*leaves, bias).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda q: ops.cross_attention(q, *leaves[1:], bias).sum())(leaves[0].detach())
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises((NotImplementedError, RuntimeError), match="forward"),
        ):
            q = leaves[0].detach()
            ops.cross_attention(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), *leaves[1:], bias)
    finally:
        ops.use_kernels("auto")


def test_refusals(monkeypatch):
    (q, k, v), bias = inputs_of("odd")[0].values(), inputs_of("odd")[1]
    for args, message in (
        ((q, k, v[:, :5], bias), "one shape"),
        ((q, k[..., :4], v[..., :4], bias), r"k must be \[3, T, 3, 13\]"),
        ((q, k[:, :0], v[:, :0], bias[:, :0]), "there must be a key"),
        ((q, k, v, bias[0]), r"bias must be \[3, 19\]"),
        ((q, k.bfloat16(), v, bias), "one dtype"),
        ((q, k, v, bias.clone().requires_grad_()), "detach it"),
        ((q, k, v, bias.to("meta")), "must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"cross_attention: .*{message}"):
            ops.cross_attention(*args)
    monkeypatch.setattr(unet_ops, "DEBUG", True)
    ops.cross_attention(q, k, v, bias)
    bias[1] = -math.inf
    with pytest.raises(ValueError, match="an image has no key"):
        ops.cross_attention(q, k, v, bias)
