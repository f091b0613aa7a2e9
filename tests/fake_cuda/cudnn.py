"""cuDNN's part on the stand-in: convolutions and attention as checks, allocations and a launch each.

cuDNN itself asks the driver for more than can be answered plainly, and torch's own convolutions go through im2col,
whose buffers would be in every peak of memory. So `install` answers `aten::convolution`, its backward and cuDNN's
attention: operands are checked as torch checks them, outputs lie as cuDNN lays them out, a declared workspace is
allocated meanwhile.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from . import device

WORKSPACE = 16 << 20
"""Bytes that a convolution takes besides: cuDNN's heuristics choose kernels with 0 to tens of MiB at SD's sizes."""

_library: list[torch.library.Library] = []


def _launch(name: str) -> None:
    device.library().fake_launch(torch.cuda.current_stream().cuda_stream, name.encode())


def _layout(x: torch.Tensor, w: torch.Tensor) -> torch.memory_format:
    """channels_last where either operand is, as cuDNN's backend in torch suggests."""
    last = torch.channels_last
    for t in (x, w):
        if t.ndim == 4 and t.is_contiguous(memory_format=last) and not t.is_contiguous():
            return last
    return torch.contiguous_format


def _check(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, operand in (("weight", w), ("bias", bias)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            raise RuntimeError(f"Input type ({x.dtype}, {x.device}) and {name} type ({operand.dtype}, "
                               f"{operand.device}) should be the same")  # fmt: skip


def _laid_out(tensors: tuple[torch.Tensor, ...], layout: torch.memory_format) -> list[torch.Tensor]:
    """Operands as cuDNN wants them: a copy where they lie otherwise."""
    return [t.contiguous(memory_format=layout) for t in tensors]


def _convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
    assert not transposed, "SD has none"
    _check(x, w, bias)
    if x.shape[1] != w.shape[1] * groups:
        raise RuntimeError(f"Given groups={groups}, weight of size {list(w.shape)}, input has {x.shape[1]} channels")
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(x.ndim - 2)
    ]
    layout = _layout(x, w)
    kept = _laid_out((x, w), layout)
    out = torch.empty([x.shape[0], w.shape[0], *sides], dtype=x.dtype, device=x.device, memory_format=layout)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
    _launch("cudnn convolution")
    del workspace, kept
    return out if bias is None else out.add_(bias.view(1, -1, *[1] * len(sides)))


def _convolution_backward(grad, x, w, sizes, stride, padding, dilation, transposed, out_padding, groups, mask):  # type: ignore[no-untyped-def]
    _check(grad, w, x)
    layout = _layout(x, w)
    kept = _laid_out((grad, x, w), layout)
    made: list[torch.Tensor | None] = [None, None, None]
    for i, (of, name) in enumerate(((x, "data"), (w, "weight"))):
        if mask[i]:
            made[i] = torch.empty(of.shape, dtype=of.dtype, device=of.device, memory_format=layout)
            workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=of.device)
            _launch(f"cudnn convolution, gradient of {name}")
            del workspace
    if mask[2]:
        made[2] = kept[0].sum([0, *range(2, grad.ndim)])
    return tuple(made)


def _attention(query, key, value, bias, compute_log_sumexp, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    """aten::_scaled_dot_product_cudnn_attention: out, logsumexp, .., all in [B, H, P, K]."""
    for name, operand in (("key", key), ("value", value), ("bias", bias)):
        if operand is not None and operand.dtype != query.dtype:
            raise RuntimeError(f"cuDNN attention: {name} is {operand.dtype}, query {query.dtype}")
    batch, heads, places, _ = query.shape
    out = query.new_empty(batch, places, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, heads, places, 1, dtype=torch.float32)
    none = torch.empty(0, device=query.device)
    seed = torch.zeros((), dtype=torch.long, device=query.device)
    _launch("cudnn attention")
    return out, lse, none, none, places, key.shape[2], seed, seed, none


def _attention_backward(grad, query, key, value, *rest: Any, **options: Any):  # type: ignore[no-untyped-def]
    _launch("cudnn attention, backward")
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def install() -> None:
    """From here to the end of the process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's own are put aside
        library.impl("convolution", _convolution, "CUDA")
        library.impl("convolution_backward", _convolution_backward, "CUDA")
        library.impl("_scaled_dot_product_cudnn_attention", _attention, "CUDA")
        library.impl("_scaled_dot_product_cudnn_attention_backward", _attention_backward, "CUDA")
    _library.append(library)
