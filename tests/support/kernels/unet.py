"""Inputs of the UNet's kernels, and the operators by the names of these inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sgg_fast import ops
from support.cases.graph import Tensors, randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5

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
    """x, weight and bias of a group norm."""
    images, spatial, channels, _ = NORMS[name]
    x = randn(0, images, channels, *spatial)
    x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    return {"x": x.to(dtype), "weight": (1 + 0.5 * randn(1, channels)).to(dtype), "bias": randn(2, channels).to(dtype)}


def shifted_inputs(name: str, dtype: torch.dtype, size: float = 1.0) -> Tensors:
    """`norm_inputs` and a shift in fp32, as a time embedding gives one under autocast."""
    images, _, channels, _ = NORMS[name]
    return norm_inputs(name, dtype) | {"shift": size * randn(3, images, channels)}


def norm_of(name: str, silu: bool = True) -> Callable[..., torch.Tensor]:
    """`group_norm_silu` with the groups of that norm."""
    return lambda x, weight, bias, shift=None: ops.group_norm_silu(x, weight, bias, NORMS[name][3], EPS, silu, shift)


def norm_beside(x, weight, bias, shift=None, slot=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`group_norm_silu_beside` of four groups."""
    return ops.group_norm_silu_beside(x, weight, bias, 4, EPS, shift_BC=shift, slot=slot)


def split_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is a large one, of several chunks."""
    from sgg_kernels import group_norm_layout  # late: it imports Triton, before which --ptx must choose

    monkeypatch.setattr(group_norm_layout, "ONE_PASS_PIXELS", 0)
    monkeypatch.setattr(group_norm_layout, "CHUNK_PIXELS", 4)


# Rows and columns. Stable Diffusion's widths are 320, 640 and 1280; a tile has 2,048 elements.
ROWS = {"plain": (5, 40), "several_tiles": (37, 96), "wide": (3, 1280), "odd": (9, 21), "one": (1, 1), "none": (0, 8)}
FORMS = {"alone": (), "residual": ("residual",), "late": ("late",), "both": ("residual", "late")}


def row_inputs(name: str, form: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """x, weight and bias of a LayerNorm, and what its form adds to x."""
    num_rows, width = ROWS[name]
    made = {"x": randn(0, num_rows, width), "weight": 1 + 0.5 * randn(1, width), "bias": randn(2, width)}
    extra = {"residual": randn(3, num_rows, width), "late": randn(4, width)}
    return {k: t.to(dtype) for k, t in (made | {k: extra[k] for k in FORMS[form]}).items()}


def layer_norm(x, weight, bias, residual=None, late=None, slot=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm`."""
    return ops.add_layer_norm(x, weight, bias, EPS, residual, late, slot)


# Images, queries, keys, heads, width of a head. Stable Diffusion's widths are 40, 80, 160; its context has 80 tokens.
ATTENTIONS = {
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


def attention_inputs(name: str, dtype: torch.dtype = torch.float16) -> tuple[Tensors, torch.Tensor]:
    """(q, k and v, the latter as slices of a wider GEMM's rows, bias with a masked third)"""
    images, queries, keys, heads, width = ATTENTIONS[name]
    q = randn(0, images, queries, heads, width)
    both = randn(1, images, keys, 3 * heads * width)
    k, v = (both[..., n * heads * width :][..., : heads * width].unflatten(-1, (heads, width)) for n in (0, 2))
    bias = 0.5 * randn(2, images, keys)
    bias[:, 1 + 2 * keys // 3 :] = -10000.0
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}, bias
