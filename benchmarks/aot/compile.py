"""Compiles the cases for one chip, without a GPU, and judges every kernel. One process per chip.

A stand-in driver gives Triton its target. The launchers run on tensors without memory, and
`sgg_kernels.launch.intercept` turns each launch into `JITFunction.warmup` with the same arguments and options, so the
compiled kernels have the shipped specialisation.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

from benchmarks.aot.cases import LEAST_WARPS, MOST_STACK, AotCase, cases
from benchmarks.aot.rules import (
    CHIPS,
    VECTOR,
    AotError,
    Budget,
    access_bytes,
    budget_problems,
    code_problems,
    read_cubin,
    resident_warps,
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel of one case on one chip, and its faults."""

    arch: str
    case: str
    kernel: str
    """Its name; `name 2` is its second launch within the case."""
    registers: int
    shared: int
    num_warps: int
    resident: int
    """Warps on an SM."""
    lane_bytes: int
    """Widest load of one lane."""
    problems: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its line in the baseline."""
        return f"{self.case} {self.kernel}"


def use_chip(arch: str) -> None:
    """Make Triton compile for `arch` in this process, once."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise AotError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    capability = CHIPS[arch].capability

    class StandIn(DriverBase):
        """The answers of a driver that the compiler needs. Its device number keys Triton's cache in this process."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is timed")

        def get_current_device(self) -> int:
            return capability

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(StandIn())


def _arguments(kernel: Any, compiled: Any, args: tuple[Any, ...]) -> list[tuple[str, int | None]]:
    """(name, value or None for a pointer) of the compiled function's arguments."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    kept = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    return [(name, given[name] if isinstance(given[name], int) else None) for name in kept]


def judge(
    arch: str,
    kernel: Any,
    compiled: Any,
    args: tuple[Any, ...],
    grid: tuple[int, ...],
    least_warps: int | None,
    vectors: bool = False,
) -> Compiled:
    """Check every rule on one compiled launch of `kernel`; args are its positional arguments."""
    from benchmarks.aot.ir import Kernel

    chip, metadata = CHIPS[arch], compiled.metadata
    if metadata.target.arch != chip.capability:
        raise AotError(f"{kernel.__name__} was compiled for {metadata.target.arch}, not {arch}")
    resources, ptx = read_cubin(compiled.asm["cubin"]), compiled.asm["ptx"]
    accesses = Kernel(compiled.asm["ttgir"], _arguments(kernel, compiled, args), grid).accesses
    budget = Budget(resources.registers, metadata.shared, metadata.num_warps)
    problems = code_problems(resources, MOST_STACK.get((arch, kernel.__name__), 0))
    problems += budget_problems(chip, budget, math.prod(grid), least_warps)
    problems += [reason for access in accesses for reason in access.problems()]
    loads = access_bytes(ptx, "ld")
    if vectors and (max(loads, default=0) < VECTOR or 2 in loads):
        problems.append(f"loads of {', '.join(map(str, sorted(set(loads))))} bytes a lane, though rows are aligned")
    return Compiled(
        arch=arch,
        case="",
        kernel=kernel.__name__,
        registers=budget.registers,
        shared=budget.shared,
        num_warps=budget.num_warps,
        resident=resident_warps(chip, budget),
        lane_bytes=max(loads, default=0),
        problems=tuple(dict.fromkeys(problems)),
    )


def _failure(arch: str, case: str, names: list[str], reason: str) -> Compiled:
    return Compiled(arch, case, names[-1] if names else "(no launch)", 0, 0, 0, 0, 0, (reason,))


def compile_cases(arch: str, some: Iterable[AotCase], least_warps: dict[str, int]) -> list[Compiled]:
    """Every launch of every case, compiled for `arch` and judged. A case that fails is a line with its reason."""
    from sgg_kernels.launch import intercept

    found: list[Compiled] = []
    for case in some:
        names: list[str] = []

        def take_over(kernel: Any, grid: tuple, args: tuple, options: dict, case: AotCase = case, names=names) -> bool:
            names.append(kernel.__name__)
            number = names.count(kernel.__name__)
            compiled = kernel.warmup(*args, grid=grid, **options)
            made = judge(arch, kernel, compiled, args, grid, least_warps.get(kernel.__name__), case.vectors)
            name = kernel.__name__ if number == 1 else f"{kernel.__name__} {number}"
            found.append(dataclasses.replace(made, case=case.name, kernel=name))
            return True

        try:
            with intercept(take_over):
                case.run()
        except AotError:
            raise
        except Exception as error:  # an error of a case is its result
            lines = str(error).strip().splitlines() or [""]
            found.append(_failure(arch, case.name, names, f"does not compile: {type(error).__name__}: {lines[-1]}"))
            continue
        if not names:
            found.append(_failure(arch, case.name, names, "the case launches no kernel"))
    return found


def compile_chip(arch: str, pattern: str = "") -> list[Compiled]:
    """Every shipped launch of the cases whose name contains `pattern`; a process compiles for one chip only."""
    use_chip(arch)
    return compile_cases(arch, [case for case in cases() if pattern in case.name], LEAST_WARPS)
