"""The gradients of many parameters from the partial column sums of their kernels, in a few launches for all.

A norm's backward leaves one row of partial sums for each program or image; a second launch adds the rows. Over the 109
norms of a UNet these are 109 launches of a microsecond. Here the rows of all norms are laid side by side, and one
launch adds the rows of all norms that have as many. The parameters get their gradients when the last norm's backward is
done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import unet_kernels

ALIGNED = 16
"""Bytes: the optimiser's kernels read gradients that start on a multiple of them."""


class _Second(torch.autograd.Function):
    """A tensor that every norm takes as an input; its backward, after all of theirs, gives the gradients."""

    @staticmethod
    def forward(ctx: Any, sums: _Call, *parameters: Tensor) -> Tensor:
        ctx.sums, ctx.parameters = sums, [(id(p), p.dtype) for p in parameters]
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        found = ctx.sums.gradients()
        return None, *(found.get(key) for key in ctx.parameters)


class _Call:
    """The partial sums of one forward's backward."""

    def __init__(self) -> None:
        self._partial: list[tuple[Tensor, list[tuple[int, torch.dtype]], int]] = []

    def add(self, partial_PKC: Tensor, parameters: Sequence[tuple[int, torch.dtype]]) -> None:
        """Sums [P, K C] of K parameters of C elements each."""
        self._partial.append((partial_PKC, list(parameters), partial_PKC.shape[1] // len(parameters)))

    def gradients(self) -> dict[tuple[int, torch.dtype], Tensor]:
        """(id of a parameter, dtype) -> its gradient; the partial sums are released."""
        alike = defaultdict(list)
        for entry in self._partial:
            alike[entry[0].shape[0], entry[1][0][1]].append(entry)
        self._partial = []
        found: dict[tuple[int, torch.dtype], Tensor] = {}
        for (_, dtype), entries in alike.items():
            rows = [partial for partial, *_ in entries]
            total = unet_kernels.column_sum(torch.cat(rows, dim=1) if len(rows) > 1 else rows[0], dtype)
            keys = [key for _, parameters, _ in entries for key in parameters]
            widths = [width for _, parameters, width in entries for _ in parameters]
            for key, gradient in zip(keys, total.split(widths), strict=True):
                if gradient.storage_offset() * gradient.element_size() % ALIGNED:
                    gradient = gradient.clone()
                found[key] = found[key] + gradient if key in found else gradient
        return found


class ColumnSums:
    """The sums of one model: `begin` before its forward, `end` after it; between them `token` is an input of its norms.

    `begin` takes the parameters whose gradients come from here; parameters that need no gradient are left out.
    """

    def __init__(self) -> None:
        self.token: Tensor | None = None
        self._call = _Call()
        self._known: set[int] = set()

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Start a forward; the sums of earlier ones belong to their own graphs."""
        self.end()
        trained = [p for p in parameters if p.requires_grad]
        if trained and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._call, self._known = _Call(), {id(p) for p in trained}
            self.token = _Second.apply(self._call, *trained)

    def end(self) -> None:
        """The norms sum for themselves again."""
        self.token, self._call, self._known = None, _Call(), set()

    def of(self, *parameters: Tensor) -> Slot | None:
        """Where a norm's backward puts the sums of these parameters; None unless all of them are among `begin`'s."""
        if self.token is None or any(id(p) not in self._known for p in parameters):
            return None
        return Slot(self.token, self._call, [(id(p), p.dtype) for p in parameters])


class Slot:
    """A norm's place in the sums."""

    def __init__(self, token: Tensor, call: _Call, parameters: list[tuple[int, torch.dtype]]) -> None:
        self.token, self._call, self._parameters = token, call, parameters

    def add(self, partial: Tensor) -> None:
        """Leave partial sums [P, K C]."""
        self._call.add(partial, self._parameters)
