"""Calls of the kernels' operators: the shortest dispatch where nothing traces, `torch.library` where something does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def _traced(args: tuple[Any, ...]) -> bool:
    """True under torch.compile, under a dispatch mode (fake tensors, counters, proxies), and for tensor subclasses."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(
        isinstance(x, Tensor) and type(x) not in _PLAIN
        for arg in args
        for x in (arg if isinstance(arg, (list, tuple)) else (arg,))
    )


class Operator:
    """A `torch.library` operator, and an `autograd.Function` around the same function for eager calls.

    The `torch.library` operator costs about three times as much host time a call. Both give the same bits. An eager
    call raises RuntimeError for forward-mode derivatives, second derivatives and `torch.func` transforms.
    """

    def __init__(self, name: str, run: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()) -> None:
        self.name, self.run = name, run
        self.library = torch.library.custom_op(name, run, mutates_args=(), tags=tags)
        self.eager = run

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Set the function that computes the shapes and dtypes of the results."""
        self.library.register_fake(fake)

    def register_gradient(self, gradient: Callable[..., Any], save: Callable[..., None]) -> None:
        """Set the backward: `save(ctx, inputs, output)` in forward, then `gradient(ctx, *grads)` gives one an input.

        An output without a gradient gives None, never a tensor of zeros. `gradient` is not called if all are None.
        """
        name, run = self.name, self.run

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.num_inputs = len(inputs)
            save(ctx, inputs, output)

        def defined(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * ctx.num_inputs
            return gradient(ctx, *grads)

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = run(*args)
                keep(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if torch.is_grad_enabled():  # create_graph=True
                    raise RuntimeError(f"{name} has no second derivative")
                return defined(ctx, *grads)

        self.library.register_autograd(defined, setup_context=keep)
        self.eager = Eager.apply

    def forward_only(self, *args: Any) -> Any:
        """The function without a gradient, for the forward of another `autograd.Function`."""
        return self.library(*args) if _traced(args) else self.run(*args)

    def __call__(self, *args: Any) -> Any:
        return self.library(*args) if _traced(args) else self.eager(*args)


def operator(name: str, *tags: torch.Tag) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: make a function of tensors the `Operator` `sgg_fast::name`."""
    return lambda run: Operator(f"sgg_fast::{name}", run, tags)
