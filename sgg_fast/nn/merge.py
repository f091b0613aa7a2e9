"""Linear layers that read one tensor, run as one GEMM, while every layer keeps its own parameters under its own name.

The weights lie end to end in one storage, so that the GEMM reads them as one matrix without a copy; each parameter is a
view into it. `.to` and its like give each weight a storage of its own: the layer that is moved last puts all end to end
again, so that a flat buffer, into which they are moved then, keeps them so. Whatever else replaces storages
(`load_state_dict(assign=True)`, DeepSpeed's flat buffers) is noticed at the next call: storages of their own are put
end to end, views into somebody else's are left where they lie, and where they are not adjacent there they are
concatenated, which costs a copy and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


def adjacent(parts: Sequence[torch.Tensor]) -> bool:
    """Whether contiguous tensors lie end to end in one storage, in this order."""
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
    """Put parameters of one dtype and device end to end into one new storage, unless they are, or are views already."""
    if not adjacent(parameters) and all(map(_owns_storage, parameters)) and not _capturing():
        joined = torch.cat([p.data.flatten() for p in parameters])
        for parameter, flat in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
            parameter.data = flat.view(parameter.shape)


@torch.no_grad()
def separate(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter a storage of its own again."""
    for parameter in parameters:
        if not _owns_storage(parameter):
            parameter.data = parameter.data.clone()


class _Join(torch.autograd.Function):
    """Tensors concatenated along their first dimension, without a copy where they are adjacent."""

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.rows = [part.shape[0] for part in parts]
        if not adjacent(parts):
            return torch.cat(parts)
        first = parts[0].data
        return first.as_strided((sum(ctx.rows), *first.shape[1:]), first.stride(), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the one gradient, which the parameters take as theirs without a copy."""
        return grads[0].split(ctx.rows)


def join(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """[sum of rows, ..]; gradients reach every parameter."""
    if torch.compiler.is_compiling():
        return torch.cat(list(parameters))
    adjoin(parameters)
    return _Join.apply(*parameters)


class Merged:
    """Layers that read one tensor, and the results that those who come later pick up.

    Two ways. `leading`: the first layer computes for all at each call, as to_q does for to_k and to_v. Else whoever
    comes first between `begin` and `end` does, and those who bring another tensor compute for themselves. A tensor is
    recognised by identity, so a result cannot be another input's.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        leading: bool = False,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.layers, self.leading, self.activation = list(layers), leading, activation
        self._open = False
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []
        for parameters in self.parameters:
            adjoin(parameters)

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """The weights, and the biases where there are any."""
        weights, biases = ([getattr(layer, name) for layer in self.layers] for name in ("weight", "bias"))
        return [weights] if biases[0] is None else [weights, biases]

    def rejoin(self) -> None:
        """After a layer was moved or cast: put the weights end to end, if that layer was the last of them."""
        for parameters in self.parameters:
            if len({(p.dtype, p.device) for p in parameters}) == 1:
                adjoin(parameters)

    def begin(self) -> None:
        """From here to `end` the first caller computes for all."""
        self.end()
        self._open = True

    def end(self) -> None:
        """Let go of the results."""
        self._open, self._input, self._outputs = False, None, []

    def _compute(self, x: torch.Tensor) -> None:
        given = x if self.activation is None else self.activation(x)
        out = F.linear(given, *map(join, self.parameters))
        # One split: its backward is one concatenation, where slices would each fill a whole gradient with zeros.
        self._input, self._outputs = x, list(out.split([layer.out_features for layer in self.layers], dim=-1))

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` gives for x."""
        if index == 0 if self.leading else self._open and self._input is None:
            self._compute(x)
        out = self._outputs[index] if x is self._input else None
        if out is None:
            layer = self.layers[index]
            return F.linear(x if self.activation is None else self.activation(x), layer.weight, layer.bias)
        if self.leading:
            self._outputs[index] = None
            if index == len(self.layers) - 1:
                self.end()
        return out


class MergedLinear(nn.Linear):
    """A layer of a `Merged`; takes the place of a stock layer by its class alone."""

    merged: tuple[Merged, int]

    def _apply(self, *args: Any, **kwargs: Any) -> MergedLinear:
        super()._apply(*args, **kwargs)
        self.merged[0].rejoin()
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., out_features]."""
        merged, index = self.merged
        return merged.project(index, input)
