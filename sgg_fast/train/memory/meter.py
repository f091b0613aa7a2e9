"""Counts what a step allocates, storage by storage, on fake or real tensors. The planner (`planner.py`) uses it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from sgg_fast.train.memory.allocator import Event, rounded

FP32_UNDER_AUTOCAST = ("group_norm", "layer_norm")
"""Operators with large results that CUDA's autocast runs in fp32 and the CPU's does not."""


@dataclasses.dataclass(eq=False)
class _Block:
    """A live storage."""

    size: int
    """Bytes; 0 for a storage that existed before the mode, which does not count."""
    key: int
    """Of its events."""
    side: str = "activations"
    ref: Any = None


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that operators allocate inside the mode, as long as the storages live.

    Counts: gradients, the temporaries of updates in backward, what a caller takes under a name of its own, and
    everything else, called activations. Workspaces inside an operator are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        """Name of what runs; the caller sets it."""
        self.now = {"activations": 0, "gradients": 0, "temporaries": 0}
        self.peaks: dict[str, dict[str, int]] = {}
        """Phase -> `now` as it was where its sum was highest."""
        self.events: list[Event] = []
        """Every allocation and release in order, for `allocator.py`."""
        self.aside: set[int | str] = set()
        """Keys of `events` that another stream allocates, whose segments serve that stream only."""
        self._keys = itertools.count()
        self._blocks: dict[int, _Block] = {}
        self._hooks: list[RemovableHandle] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of its results."""
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            self._see(tensor, new=False)
        results = func(*args, **kwargs)
        for tensor in _tensors((results,)):
            self._see(tensor, new=True)
        return results

    def _see(self, tensor: torch.Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        block = self._blocks[key] = _Block(rounded(storage.nbytes()) if new else 0, next(self._keys))
        block.ref = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        if block.size:
            self.events.append((block.key, block.size))
            self._count(block.side, block.size)

    def _gone(self, key: int) -> None:
        block = self._blocks.pop(key)
        if block.size:
            self.events.append((block.key, -1))
            self.now[block.side] -= block.size

    def take(self, side: str, size: int) -> int:
        """Count `size` bytes that no operator here allocates; returns the key to `give` them back."""
        key = next(self._keys)
        self.events.append((key, size))
        self._count(side, size)
        return key

    def give(self, side: str, size: int, key: int) -> None:
        """End of what `take` counted."""
        self.events.append((key, -1))
        self.now[side] -= size

    def _count(self, side: str, size: int) -> None:
        self.now[side] = self.now.get(side, 0) + size
        if sum(self.now.values()) > sum(self.peaks.get(self.phase, self.now | {side: -1}).values()):
            self.peaks[self.phase] = dict(self.now)

    def keep_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Count the parameters' gradients as gradients, each once it is complete."""

        def on_gradient(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            block = self._blocks.get(parameter.grad.untyped_storage()._cdata)
            if block is not None and block.side == "activations":
                block.side = "gradients"
                self.now["activations"] -= block.size
                self.now["gradients"] += block.size

        self._hook(parameters, on_gradient)

    def bucket_gradients(self, parameters: list[nn.Parameter], bucket: int, buffer: int, aside: bool = False) -> None:
        """Count gradients as under ZeRO-2: they go into a bucket of `bucket` elements.

        When the bucket is full for the first time, one buffer of `buffer` bytes is allocated for all of them. aside: by
        another stream.
        """
        filled = 0

        def on_gradient(parameter: torch.Tensor) -> None:
            nonlocal filled
            parameter.grad = None
            before, filled = filled, filled + parameter.numel()
            if before < bucket <= filled:
                key = self.take("gradients", buffer)
                self.aside |= {key} if aside else set()

        self._hook(parameters, on_gradient)

    def use_gradients(self, parameters: list[nn.Parameter], temporary: Callable[[torch.Tensor], int]) -> None:
        """Free each gradient where it arises, after an update that needs `temporary(parameter)` bytes."""

        def on_gradient(parameter: torch.Tensor) -> None:
            if size := temporary(parameter):
                self.give("temporaries", size, self.take("temporaries", size))
            parameter.grad = None

        self._hook(parameters, on_gradient)

    def _hook(self, parameters: list[nn.Parameter], on_gradient: Callable[[torch.Tensor], None]) -> None:
        self._hooks += [parameter.register_post_accumulate_grad_hook(on_gradient) for parameter in parameters]

    def __exit__(self, *args: Any) -> None:
        """Leave the mode and remove its hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*args)


@contextlib.contextmanager
def autocast_like_cuda(dtype: torch.dtype | None) -> Iterator[None]:
    """Emulates the memory of CUDA's autocast to `dtype` on CPU tensors; None changes nothing.

    A fake tensor can be on a GPU only where torch has one, so the planner's tensors are on the CPU.
    """
    if dtype is None:
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in FP32_UNDER_AUTOCAST:
            library.impl(name, _in_fp32(getattr(torch, name)), "AutocastCPU")
        with torch.autocast("cpu", dtype):
            yield


def _in_fp32(operator: Any) -> Any:
    def run(*args: Any) -> torch.Tensor:
        below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return operator(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))

    return run
