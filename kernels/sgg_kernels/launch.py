"""The one place where a kernel is launched, so that what is checked ahead of time is exactly what ships.

`intercept` lets a caller see every launch, or take it over: the ahead-of-time check compiles instead of running,
the benchmarks count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Interceptor = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], bool]
"""(kernel, grid, positional arguments, constexprs and options) -> True where it took the launch over."""

_interceptor: Interceptor | None = None


@contextlib.contextmanager
def intercept(interceptor: Interceptor) -> Iterator[None]:
    """Show every launch inside the block to `interceptor` first. Not reentrant, not for threads."""
    global _interceptor
    assert _interceptor is None, "launches are intercepted already"
    _interceptor = interceptor
    try:
        yield
    finally:
        _interceptor = None


def _on_device_of(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, on that device's stream, whatever device the tensors are on."""
    device = next((x.device for x in args if isinstance(x, torch.Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, except for an empty grid, which launches nothing.

    `enable_fp_fusion` is set here for every kernel: its default changes with Triton's version, and with it bits.
    """
    if 0 in grid:
        return
    options = {"enable_fp_fusion": True, **options}
    if _interceptor is None or not _interceptor(kernel, grid, args, options):
        with _on_device_of(args):
            kernel[grid](*args, **options)
