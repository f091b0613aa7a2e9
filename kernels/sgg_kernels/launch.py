"""Launches every kernel, so that the ahead-of-time check sees exactly the shipped launches.

`intercept` shows a caller every launch, or lets it replace the launch: the ahead-of-time check compiles, the
benchmarks count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Interceptor = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], bool]
"""(kernel, grid, positional arguments, constexprs and options) -> True if it replaced the launch."""

_interceptor: Interceptor | None = None


@contextlib.contextmanager
def intercept(interceptor: Interceptor) -> Iterator[None]:
    """Call `interceptor` before every launch inside the block. Not reentrant, not thread-safe."""
    global _interceptor
    assert _interceptor is None, "launches are intercepted already"
    _interceptor = interceptor
    try:
        yield
    finally:
        _interceptor = None


def _on_device_of(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
    """Context that makes the tensors' device current: Triton launches on the current device and its stream."""
    device = next((x.device for x in args if isinstance(x, torch.Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, except for an empty grid, which launches nothing.

    `enable_fp_fusion` is set for every kernel: its default changes with Triton's version, and it changes the bits.
    """
    if 0 in grid:
        return
    options = {"enable_fp_fusion": True, **options}
    if _interceptor is None or not _interceptor(kernel, grid, args, options):
        with _on_device_of(args):
            kernel[grid](*args, **options)
