"""Replaces Triton's launches: compiled for a chip without a driver, then run by the machine on the tensors' memory.

Two chips often get the same program. It is translated once and has one set of counters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.aot.compile import use_chip
from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.memory import Memory
from benchmarks.aot.ptx.program import PtxError, digest

LAUNCHERS = "sgg_kernels."
"""Modules whose `torch.empty` must be written before a kernel reads it."""


@dataclasses.dataclass
class Fresh:
    """Tensors allocated by launchers, and which of their bytes were written. They are kept, so no address repeats."""

    tensors: list[torch.Tensor] = dataclasses.field(default_factory=list)
    written: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def add(self, x: torch.Tensor) -> None:
        """Add a tensor whose elements are uninitialised."""
        if x.numel() and x.device.type == "cpu":
            storage = x.untyped_storage()
            self.tensors.append(x)
            self.written[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)

    def forget(self) -> None:
        """Clear the record between two cases."""
        self.tensors.clear()
        self.written.clear()


class Living:
    """The CPU tensors of this process by address, for kernels that follow tables of addresses.

    A scan of all objects is slow, so its result is cached as long as the tensors live.
    """

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref] = {}

    def at(self, address: int) -> tuple[int, int] | None:
        """(base, bytes) of the storage that holds an address."""
        return self._known(address) or self._scan(address)

    def _known(self, address: int) -> tuple[int, int] | None:
        for ref in self._seen.values():
            x = ref()
            if x is not None and (found := _holds(x, address)):
                return found
        return None

    def _scan(self, address: int) -> tuple[int, int] | None:
        self._seen.clear()
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided:
                self._seen[id(x)] = weakref.ref(x)
        return self._known(address)


def _holds(x: torch.Tensor, address: int) -> tuple[int, int] | None:
    storage = x.untyped_storage()
    base, num_bytes = storage.data_ptr(), storage.nbytes()
    return (base, num_bytes) if base <= address < base + num_bytes else None


def _parameters(kernel: Any, compiled: Any, args: tuple, options: dict) -> tuple[list, list[tuple[str, torch.Tensor]]]:
    """(arguments after specialisation plus two scratch pointers, their tensors by name)"""
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    values: list = []
    tensors = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value = given[name]
        if isinstance(value, torch.Tensor):
            tensors.append((name, value))
            values.append(value.data_ptr())
        elif kind == "fp32":
            values.append(np.float32(value).view(np.uint32))
        elif isinstance(value, int):
            values.append(value)
        else:
            raise PtxError(f"{kernel.__name__}: argument {name} of type {kind} is not known")
    return [*values, 0, 0], tensors


class Host:
    """The programs of one process and chip, by digest."""

    def __init__(self, arch: str, *, check: bool = True, count: bool = False) -> None:
        self.arch, self.check, self.count = arch, check, count
        self.sample: int | None = None
        """Most programs of a launch that run, spread evenly; None for all."""
        self.kernels: dict[str, Kernel] = {}
        self.names: dict[str, str] = {}
        """Digest -> name of the Triton kernel."""
        self.launches = 0
        self.launched: set[str] = set()
        """Digests of what has run; for the caller to clear."""
        self.fresh = Fresh()
        self._living = Living()

    def run(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        """Run one launch. Raises `PtxError` with every fault that the machine found."""
        name, program = self.program_of(kernel, compiled)
        values, tensors = _parameters(kernel, compiled, args, options)
        memory = Memory(self.check, program.notes)
        memory.resolve = self._living.at
        for tensor_name, x in tensors:
            storage = x.untyped_storage()
            written = self.fresh.written.get(storage.data_ptr())
            memory.add(storage.data_ptr(), storage.nbytes(), tensor_name, x.element_size(), written)
        self.launches += 1
        self.launched.add(name)
        program.launch((*grid, 1, 1)[:3], values, memory, count=self.count, sample=self.sample)
        if program.notes:
            notes = "; ".join(f"{what} ({times} times)" for what, times in program.notes.most_common(3))
            program.notes.clear()
            raise PtxError(f"{kernel.__name__} ({self.arch}): {notes}")

    def program_of(self, kernel: Any, compiled: Any) -> tuple[str, Kernel]:
        """Digest and program of a compiled kernel, which is read once."""
        text, shared = self.text_of(compiled), compiled.metadata.shared
        name = digest(text, shared)
        if name not in self.kernels:
            self.kernels[name], self.names[name] = Kernel(text, shared), kernel.__name__
        return name, self.kernels[name]

    def text_of(self, compiled: Any) -> str:
        """The PTX of a compiled kernel; tests plant faults here."""
        return compiled.asm["ptx"]

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[Host]:
        """Context in which every launch of a Triton kernel runs here, and CPU tensors count as device tensors."""
        from triton.runtime import jit

        from sgg_fast.ops import dispatch

        use_chip(self.arch)
        original, why, empty = jit.JITFunction.run, dispatch.why_not_triton, torch.empty

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = original(kernel, *args, grid=grid, warmup=True, **options)
            if not warmup:
                places = grid(dict(zip(kernel.arg_names, args, strict=False)) | options) if callable(grid) else grid
                self.run(kernel, compiled, places, args, options)
            return compiled

        def remembered(*args: Any, **options: Any) -> torch.Tensor:
            made = empty(*args, **options)
            if sys._getframe(1).f_globals.get("__name__", "").startswith(LAUNCHERS):
                self.fresh.add(made)
            return made

        jit.JITFunction.run = run
        dispatch.why_not_triton = lambda device, dtypes=(): why(torch.device("cuda"), dtypes)
        torch.empty = remembered
        try:
            yield self
        finally:
            jit.JITFunction.run, dispatch.why_not_triton, torch.empty = original, why, empty
