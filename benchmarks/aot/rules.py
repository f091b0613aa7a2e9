"""Rules for a compiled kernel, checked on its machine code, its PTX and its TTGIR.

Every rule returns reasons; a missing tool or answer is a fault, never a skip.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class AotError(RuntimeError):
    """The check itself cannot run; the message gives the reason."""


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a new process, without Triton's interpreter. Raises `AotError` if that process dies."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=_without_interpreter) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.BrokenExecutor as error:
            raise AotError(f"{args[0]}: its process died: {error}") from error


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of a compute capability (CUDA C++ Programming Guide, technical specifications)."""

    capability: int
    shared_optin_kb: int
    """Limit of one block."""
    shared_sm_kb: int
    warps: int
    """Resident warps of an SM; also its limit of resident blocks."""
    blocks: int
    sms: int
    """SMs of the usual card: A100, RTX 3090, RTX 4090, H100, RTX 5090."""


CHIPS = {
    "sm_80": Chip(80, 163, 164, 64, 32, 108),
    "sm_86": Chip(86, 99, 100, 48, 16, 82),
    "sm_89": Chip(89, 99, 100, 48, 24, 128),
    "sm_90": Chip(90, 227, 228, 64, 32, 132),
    "sm_120": Chip(120, 99, 100, 48, 24, 170),
}

REGISTERS_PER_SM, REGISTER_UNIT = 65536, 256
"""Registers are allocated to a warp at a time, in units of 256."""

VECTOR = 16
"""Bytes of the widest load of one lane."""

SHARED_RESERVED = 1024
"""Bytes of every block that the system reserves."""

_ATOMICS = {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS"}
_LOCALS = {"LDL", "STL"}
_DOUBLES = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}


@dataclasses.dataclass(frozen=True)
class Resources:
    """Output of `cuobjdump` for one kernel."""

    registers: int
    stack: int
    opcodes: frozenset[str]
    """Opcodes with their modifiers."""


def cuobjdump() -> str:
    """Path of the tool: Triton's own, or the PATH's. Raises `AotError` if there is none."""
    import triton

    shipped = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise AotError(f"cuobjdump is neither at {shipped} nor on PATH: registers and stack cannot be read")
    return found


@functools.lru_cache(maxsize=256)
def read_cubin(cubin: bytes) -> Resources:
    """Registers, stack and instructions of the one kernel of a cubin. Cached, because many cases share a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump(), "-sass", "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise AotError(f"cuobjdump failed: {(done.stderr or done.stdout).strip()}")
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", done.stdout)
    if len(usage) != 1 or "EXIT" not in opcodes:
        raise AotError(f"cuobjdump's answer cannot be read: {len(usage)} kernels, {len(opcodes)} instructions")
    return Resources(int(usage[0][0]), int(usage[0][1]), frozenset(opcodes))


def code_problems(resources: Resources, most_stack: int = 0) -> list[str]:
    """Stack beyond `most_stack` bytes, local memory without a stack, atomics, double precision, in the machine code."""
    problems, bases = [], {opcode: opcode.split(".")[0] for opcode in resources.opcodes}
    if resources.stack > most_stack:
        problems.append(f"stack of {resources.stack} bytes")
    locals_ = frozenset() if 0 < resources.stack <= most_stack else _LOCALS
    for reason, forbidden in (("local memory", locals_), ("atomic", _ATOMICS), ("double precision", _DOUBLES)):
        used = sorted(opcode for opcode, base in bases.items() if base in forbidden)
        problems += [f"{reason}: {', '.join(used)}"] if used else []
    converted = sorted(o for o in resources.opcodes if re.search(r"\.F64|64H", o))
    problems += [f"double precision: {', '.join(converted)}"] if converted else []
    return problems


@dataclasses.dataclass(frozen=True)
class Budget:
    """Resources of an SM that one block of a kernel uses."""

    registers: int
    """Registers of a thread."""
    shared: int
    """Shared memory in bytes."""
    num_warps: int


def resident_warps(chip: Chip, budget: Budget) -> int:
    """Warps that fit on one SM at once, by registers, shared memory and the limits of the chip."""
    per_warp = -(-max(budget.registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PER_SM // per_warp // budget.num_warps
    by_shared = chip.shared_sm_kb * 1024 // (budget.shared + SHARED_RESERVED)
    return min(by_registers, by_shared, chip.blocks, chip.warps // budget.num_warps) * budget.num_warps


def budget_problems(chip: Chip, budget: Budget, programs: int, least_warps: int | None) -> list[str]:
    """Faults: shared memory beyond the opt-in limit; fewer resident warps than declared and than the grid provides."""
    problems = []
    if budget.shared > chip.shared_optin_kb * 1024:
        problems.append(f"{budget.shared} bytes of shared memory, the limit is {chip.shared_optin_kb} KB")
    if least_warps is None:
        return [*problems, "no occupancy declared for this kernel (benchmarks/aot/cases.py, LEAST_WARPS)"]
    resident = resident_warps(chip, budget)
    wanted = min(least_warps, -(-programs // chip.sms) * budget.num_warps)
    if resident < wanted:
        problems.append(
            f"{resident} resident warps ({budget.registers} registers, {budget.shared} bytes shared, blocks of "
            f"{budget.num_warps} warps), {wanted} wanted"
        )
    return problems


def access_bytes(ptx: str, kind: str) -> list[int]:
    """Bytes of one lane in every global load ("ld") or store ("st") of the PTX."""
    found = re.findall(rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]
