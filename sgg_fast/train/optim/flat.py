"""Parameters that share one flat buffer, so an optimiser's step needs few launches for any number of parameters.

Gradients are not flat: backward leaves each at its own address, and the step finds them through a table of addresses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sgg_fast.ops.adam import Weights, write_weights

CHUNK = 1 << 22
"""Elements that an update without kernels of ours works on at once, which bounds its temporaries."""

PAD = 256
"""Alignment, in elements, of each parameter: 1 KiB, and a block of 8-bit state."""


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension in memory order, as a view. The tensor must be dense, in any order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def as_matrix(tensor: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of the matrix that a dense tensor's memory is: its outermost dimension, and all others."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    _, outermost = max(((stride, size) for stride, size in sizes if size > 1), default=(1, 1))
    return outermost, tensor.numel() // outermost


def _places(parameters: list[nn.Parameter]) -> list[int]:
    """Indices of the parameters in buffer order: the given order, but views of one storage follow each other.

    Weights that lie end to end, so that one GEMM reads them all, stay end to end.
    """
    first: dict[int, int] = {}
    storages = [p.untyped_storage()._cdata for p in parameters]
    for i, storage in enumerate(storages):
        first.setdefault(storage, i)
    return sorted(range(len(parameters)), key=lambda i: (first[storages[i]], parameters[i].storage_offset(), i))


class FlatParameters:
    """Parameters moved into one buffer of their type, each a view with the strides it had. Padding holds zeros."""

    def __init__(self, parameters: Iterable[nn.Parameter], pad: int = PAD) -> None:
        """Move the parameters. pad: alignment of each one in elements.

        Raises ValueError for parameters that are not all fp32 or all bf16, or not dense, and for an empty list.
        """
        self.parameters = list(parameters)
        dtypes = {p.dtype for p in self.parameters}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ValueError("flat parameters: there must be some, all in fp32 or all in bf16")
        if not all(torch.ops.aten.is_non_overlapping_and_dense(p) for p in self.parameters):
            raise ValueError("flat parameters: a parameter is not dense")
        self.offsets, end = [0] * len(self.parameters), 0
        for i in _places(self.parameters):
            self.offsets[i] = end
            end += -(-self.parameters[i].numel() // pad) * pad
        (dtype,), device = dtypes, self.parameters[0].device
        if device.type == "cuda":  # the device never holds both copies: the peak of a run with a small state
            for parameter in self.parameters:
                parameter.data = parameter.data.cpu()
            torch.cuda.empty_cache()
        self.buffer = torch.zeros(-(-end // PAD) * PAD, dtype=dtype, device=device)
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            place = self.buffer.as_strided(parameter.shape, parameter.stride(), offset)
            parameter.data = place.copy_(parameter.data)

    def gradients(self, indices: Iterable[int] | None = None) -> tuple[list[torch.Tensor], list[int]]:
        """The gradients that exist, of all parameters or of these: flat in memory order, and their offsets."""
        chosen = range(len(self.parameters)) if indices is None else indices
        there = [i for i in chosen if self.parameters[i].grad is not None]
        return [flat_gradient(self.parameters[i]) for i in there], [self.offsets[i] for i in there]


def flat_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient in its parameter's layout, aligned to 16 bytes; it is rarely copied."""
    grad = parameter.grad
    assert grad is not None
    if not _same_layout(grad, parameter) or grad.storage_offset() * grad.element_size() % 16:
        grad = torch.empty_strided(parameter.shape, parameter.stride(), dtype=grad.dtype, device=grad.device).copy_(
            grad
        )
    return in_memory_order(grad)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether elements lie in one order. The stride of a dimension of size 1 (1 x 1 convolutions) is ignored."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(of_a == of_b for size, of_a, of_b in strides if size > 1)


@torch.no_grad()
def keep_low_halves(parameters: Iterable[nn.Parameter]) -> None:
    """Make fp32 parameters bf16, each with the low half of its bits (`Weights.low`) beside it for `take_low_halves`."""
    for parameter in parameters:
        if parameter.dtype == torch.float32:
            wide = parameter.data
            high, low = torch.empty_like(wide, dtype=torch.bfloat16), torch.empty_like(wide, dtype=torch.int16)
            flat = Weights(in_memory_order(high), in_memory_order(low))
            write_weights(flat, slice(None), in_memory_order(wide), torch.zeros((), dtype=torch.int32))
            parameter.data, parameter.low_half = high, low  # type: ignore[attr-defined]


def take_low_halves(flat: FlatParameters) -> torch.Tensor:
    """int16 like the buffer: the low halves that the parameters keep, which they then keep no longer; else 0."""
    lows = torch.zeros_like(flat.buffer, dtype=torch.int16)
    for parameter, offset in zip(flat.parameters, flat.offsets, strict=True):
        if (kept := parameter.__dict__.pop("low_half", None)) is not None:
            lows.as_strided(parameter.shape, parameter.stride(), offset).copy_(kept)
    return lows
