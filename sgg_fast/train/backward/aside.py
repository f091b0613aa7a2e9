"""Weight gradients aside: on the second stream, while backward goes on with the gradients of the layers' inputs.

A layer's input and its output's gradient must outlive the second stream's use of them. Told of another stream, torch's
allocator would free nothing more inside of a capture, so references wait here, up to `HELD_BYTES`; beyond, backward
waits for the oldest. An update (`behind.py`) follows its gradients in the same stream. On a CPU the same runs without
streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

from sgg_fast.config import Config
from sgg_fast.train.backward.behind import Behind, goes_behind

HELD_BYTES = 128 * 2**20
"""Bytes of inputs and gradients whose weight gradients backward need not wait for."""

Left = tuple[list[nn.Parameter], list[nn.Parameter]]
"""The parameters of a layer's weight and of its bias, where it leaves them; a merged layer has several."""

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Of a layer's input, weight and bias."""


def goes_aside(config: Config, num_processes: int) -> bool:
    """Whether a captured step computes the UNet's weight gradients on the second stream."""
    return config.run.weight_gradients == "aside" and goes_behind(config.optim, num_processes)


class Aside(TorchFunctionMode):
    """Mode of a forward whose linear layers and convolutions leave their weight gradients to the second stream.

    The operators are those of torch's own backward, so the bits are the same. Each weight must serve one layer's call.
    """

    def __init__(self, behind: Behind, parameters: Iterable[nn.Parameter]) -> None:
        """parameters: those that layers may leave. Others keep torch's backward."""
        super().__init__()
        chosen = set(parameters)
        self.behind = behind
        self._numbers = {p: number for number, p in enumerate(behind.parameters) if p in chosen}
        self._held: deque[tuple[torch.cuda.Event, tuple[torch.Tensor, ...]]] = deque()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d) and torch.is_grad_enabled():
            return self._layer(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _layer(self, func: Any, input: Any, weight: Any, bias: Any = None, *rest: Any, **more: Any) -> torch.Tensor:
        parameters = self._left(weight)
        if not parameters or more:
            return func(input, weight, bias, *rest, **more)
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        of_bias = [] if bias is None else self._left(bias)
        if bias is not None:
            bias = (bias.detach() if of_bias else bias).to(dtype)
        # It requires a gradient, so backward reaches the layer; a parameter itself would have its hooks called.
        weight = weight.detach().to(dtype).requires_grad_()
        return _Layer.apply(self, func, rest, (parameters, of_bias), input.to(dtype), weight, bias)

    def _left(self, tensor: torch.Tensor) -> list[nn.Parameter]:
        """The parameters that a layer's tensor is made of; empty if one of them keeps torch's backward."""
        parts = getattr(tensor, "parts", [tensor])
        return parts if all(part in self._numbers for part in parts) else []

    def start(self, compute: Callable[[], Gradients], left: Left) -> torch.cuda.Event | None:
        """Add the gradients of weight and bias to those of their parameters; returns the event of their end."""
        with self.behind.beside():
            for gradient, parameters in zip(compute()[1:], left, strict=True):
                if gradient is None:
                    continue
                for parameter, rows in zip(parameters, gradient.split([len(p) for p in parameters]), strict=True):
                    rows = rows.to(parameter.dtype)
                    parameter.grad = rows if parameter.grad is None else parameter.grad.add_(rows)
            return self.behind.stream.record_event() if self.behind.stream else None

    def done(self, event: torch.cuda.Event | None, left: Left, *used: torch.Tensor) -> None:
        """After `start`, once backward needs the weights no more: they may be updated. used: what `start` reads."""
        if self.behind.stream and event:
            self._held.append((event, used))
            while sum(t.nbytes for _, tensors in self._held for t in tensors) > HELD_BYTES:
                torch.cuda.current_stream(self.behind.stream.device).wait_event(self._held.popleft()[0])
        for parameters in left:
            for parameter in parameters:
                self.behind.ready(self._numbers[parameter])

    def finish(self) -> None:
        """After backward: the stream that goes on waits for all gradients."""
        self.behind.join()
        self._held.clear()

    def forget(self) -> None:
        """After a backward that failed."""
        self._held.clear()


class _Layer(torch.autograd.Function):
    """A linear layer or a convolution."""

    @staticmethod
    def forward(
        ctx: Any, aside: Aside, func: Any, rest: Any, left: Left, x: Any, weight: Any, bias: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.aside, ctx.func, ctx.rest, ctx.left = aside, func, rest, left
        return func(x, weight, bias, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad, is_linear, left = grads[0], ctx.func is F.linear, ctx.left
        if is_linear:
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        elif x.is_contiguous(memory_format=torch.channels_last):  # else each of two calls would copy a slice
            grad = grad.contiguous(memory_format=torch.channels_last)

        def gradients(*wanted: bool) -> Gradients:
            return (_of_linear if is_linear else _of_conv2d)(grad, x, weight, wanted, *ctx.rest)

        event = ctx.aside.start(lambda: gradients(False, True, bool(left[1])), left)
        of_x, _, of_bias = gradients(ctx.needs_input_grad[4], False, ctx.needs_input_grad[6])
        ctx.aside.done(event, left, x, grad)
        if is_linear and of_x is not None:
            of_x = of_x.view(ctx.saved_tensors[0].shape)
        return None, None, None, None, of_x, None, of_bias


def _of_linear(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, ...]) -> Gradients:
    """Gradients of input [M, K], weight [N, K] and bias [N], by that of the output [M, N]."""
    return (
        grad.mm(weight) if wanted[0] else None,
        grad.t().mm(x) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
    )


def _of_conv2d(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    wanted: tuple[bool, ...],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Gradients:
    """Gradients of input, weight and bias."""
    if not any(wanted):
        return None, None, None
    sizes = _pair(stride), _pair(padding), _pair(dilation), False, (0, 0), groups
    return torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *sizes, wanted)
