"""Runs linear layers that read the same tensor as one GEMM; every layer keeps its parameters under its own name.

The weights are adjacent in one storage, so the GEMM reads them as one matrix without a copy; each parameter is a view
into it. `.to` and similar calls give each weight its own storage; the layer that is moved last makes them adjacent
again, so a flat buffer built afterwards keeps them adjacent. The next call detects other replacements of storages
(`load_state_dict(assign=True)`, DeepSpeed's flat buffers): parameters with their own storages become adjacent again,
and views into a foreign storage stay there. Views that are not adjacent are concatenated, which costs one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


def adjacent(parts: Sequence[torch.Tensor]) -> bool:
    """True if contiguous tensors are adjacent in one storage, in this order."""
    storage, offset = parts[0].untyped_storage()._cdata, parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != offset or not part.is_contiguous():
            return False
        offset += part.numel()
    return True


def _owns_storage(part: torch.Tensor) -> bool:
    return part.is_contiguous() and part.untyped_storage().nbytes() == part.numel() * part.element_size()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def adjoin(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters of one dtype and device into one new storage, unless they are adjacent or views already."""
    if not adjacent(parameters) and all(map(_owns_storage, parameters)) and not _capturing():
        joined = torch.cat([p.data.flatten() for p in parameters])
        for parameter, flat in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
            parameter.data = flat.view(parameter.shape)


@torch.no_grad()
def separate(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter its own storage again."""
    for parameter in parameters:
        if not _owns_storage(parameter):
            parameter.data = parameter.data.clone()


class _Join(torch.autograd.Function):
    """Concatenation along the first dimension, without a copy if the tensors are adjacent."""

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.rows = [part.shape[0] for part in parts]
        if not adjacent(parts):
            return torch.cat(parts)
        first = parts[0].data
        return first.as_strided((sum(ctx.rows), *first.shape[1:]), first.stride(), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the gradient, one a parameter, without a copy."""
        return grads[0].split(ctx.rows)


def join(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """[sum of rows, ..]; gradients reach every parameter, which `parts` of the result names."""
    if torch.compiler.is_compiling():
        return torch.cat(list(parameters))
    adjoin(parameters)
    joined = _Join.apply(*parameters)
    joined.parts = list(parameters)
    return joined


class Merged:
    """Layers that read the same tensor, and the shared results of their GEMM.

    With `leading` the first layer computes for all at each call, as to_q does for to_k and to_v. Otherwise the first
    caller between `begin` and `end` computes for all, and a caller with another tensor computes its own result. Tensors
    are compared by identity, so a result always belongs to the caller's input. `activation` is applied to the input.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        leading: bool = False,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        before: Sequence[nn.Conv2d] = (),
    ) -> None:
        """before: one convolution a layer; its bias is added to the layer's."""
        self.layers, self.leading, self.activation = list(layers), leading, activation
        self.before = list(before)
        self._open = False
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []
        for parameters in self.parameters:
            adjoin(parameters)

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """The weights, the biases if the layers have them, and those of the convolutions."""
        kinds: list[tuple[Sequence[nn.Module], str]] = [
            (self.layers, "weight"),
            (self.layers, "bias"),
            (self.before, "bias"),
        ]
        found = [[getattr(layer, name) for layer in layers] for layers, name in kinds]
        return [parameters for parameters in found if parameters and parameters[0] is not None]

    def rejoin(self) -> None:
        """Make the weights adjacent again after the last layer was moved or cast."""
        for parameters in self.parameters:
            if len({(p.dtype, p.device) for p in parameters}) == 1:
                adjoin(parameters)

    def begin(self) -> None:
        """Start sharing: until `end` the first caller computes for all."""
        self.end()
        self._open = True

    def end(self) -> None:
        """Stop sharing and release the results."""
        self._open, self._input, self._outputs = False, None, []

    def _compute(self, x: torch.Tensor) -> None:
        given = x if self.activation is None else self.activation(x)
        weight, *biases = map(join, self.parameters)
        out = F.linear(given, weight, sum(biases[1:], biases[0]) if biases else None)
        if self.before:
            out = out.to(torch.promote_types(out.dtype, torch.float32))  # as the norms behind read a shift
        # The backward of one split is one concatenation; each slice would fill a whole gradient with zeros.
        self._input, self._outputs = x, list(out.split([layer.out_features for layer in self.layers], dim=-1))

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer `index` for x."""
        if index == 0 if self.leading else self._open and self._input is None:
            self._compute(x)
        out = self._outputs[index] if x is self._input else None
        if out is None:
            layer = self.layers[index]
            bias = layer.bias + self.before[index].bias if self.before else layer.bias  # type: ignore[operator]
            return F.linear(x if self.activation is None else self.activation(x), layer.weight, bias)
        if self.leading:
            self._outputs[index] = None
            if index == len(self.layers) - 1:
                self.end()
        return out


class MergedLinear(nn.Linear):
    """A layer of a `Merged`; differs from a stock layer only by its class."""

    merged: tuple[Merged, int]

    def _apply(self, *args: Any, **kwargs: Any) -> MergedLinear:
        super()._apply(*args, **kwargs)
        self.merged[0].rejoin()
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., out_features]."""
        merged, index = self.merged
        return merged.project(index, input)
