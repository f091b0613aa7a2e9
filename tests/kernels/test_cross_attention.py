"""`cross_attention` against a formula in float64 by loops, against its pure-torch form, and what else it promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sgg_kernels import cross_attention as kernels
from support.cases.graph import Tensors, randn
from support.kernels.unet import ATTENTIONS, attention_inputs

from benchmarks.aot.compare import compare_norms as assert_within_rule
from sgg_fast import ops
from sgg_fast.ops import unet_ops

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Small images have several chunks of queries, each of more than one block."""
    monkeypatch.setattr(kernels, "PROGRAMS", 9)


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
@pytest.mark.parametrize("name", ATTENTIONS)
def test_against_the_formulas(name, dtype, device, poisoned, launched):
    compare(*attention_inputs(name, dtype), device)
    if 0 not in ATTENTIONS[name]:
        stem = "cross_attention"
        assert launched == [f"{stem}_{part}_kernel" for part in ("fwd", "bwd_q", "bwd_kv")] + ["column_sum_kernel"]


@pytest.mark.parametrize("name", ["40", "odd", "keys 77"])
def test_against_sdpa(name, device):
    """The reference is ours; torch's attention is somebody else's."""
    inputs, bias = attention_inputs(name)
    inputs, bias = {k: x.to(device) for k, x in inputs.items()}, bias.to(device)

    def sdpa(q, k, v, bias):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, bias[:, None, None].to(q)).transpose(1, 2)

    g = randn(3, *inputs["q"].shape).to(device)
    found = evaluate("triton", inputs, bias, g)
    torch.testing.assert_close(found, evaluate("reference", inputs, bias, g, sdpa), rtol=5e-3, atol=2e-3)


def test_layouts(device, poisoned):
    """Heads before rows, and a gradient that is expanded: copied, with the same values."""
    inputs, bias = attention_inputs("40")
    inputs, bias = {k: x.to(device) for k, x in inputs.items()}, bias.to(device)
    g = randn(3, 1, 1, 1, 40).to(device).expand(inputs["q"].shape)
    found = evaluate("triton", inputs, bias, g)
    moved = {k: x.transpose(1, 2).contiguous().transpose(1, 2) for k, x in inputs.items()}
    wide = torch.stack([bias, bias], -1)[..., 0]
    again = evaluate("triton", moved, wide, g.contiguous())
    assert all(torch.equal(x, again[k]) for k, x in found.items())


def test_masked_keys_get_nothing_and_give_nothing(device):
    inputs, bias = attention_inputs("40", torch.bfloat16)
    first = compare(inputs, bias, device)
    shut = (bias < -1e3).to(device)
    assert shut.any() and (first["grad k"][shut] == 0).all() and (first["grad v"][shut] == 0).all()
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in ("k", "v"):
        changed[name][shut.cpu()] = 77.0
    again = compare(changed, bias, device)
    assert torch.equal(again["out"], first["out"]) and torch.equal(again["grad q"], first["grad q"])


@pytest.mark.parametrize("size", [64.0, 8192.0])
def test_large_scores(size, device, poisoned):
    """The row's maximum is taken off, so nothing overflows; -inf shuts a key out, too.

    In quarters the sums are exact, so scores tie (two keys are equal) or are far apart: no rounding decides a row.
    """
    inputs, bias = attention_inputs("odd")
    q, k = (torch.round(4 * inputs[name]) / 4 for name in ("q", "k"))
    k[:, 1] = k[:, 0]
    bias = torch.where(bias < -1e3, -math.inf, 0.0)
    bias[0, 3:] = -math.inf
    compare({"q": size * q, "k": k, "v": inputs["v"]}, bias, device)


def test_same_bits_twice_and_images_apart(device):
    inputs, bias = attention_inputs("40", torch.bfloat16)
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
    inputs, bias = attention_inputs("odd", torch.float32)
    compare(inputs, bias, device)
    assert launched == []
