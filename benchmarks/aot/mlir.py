"""A module of MLIR text as plain data: operations by block, with types and constants. It uses Triton's own parser."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
from typing import Any


@dataclasses.dataclass(frozen=True)
class LaneLayout:
    """The layout of a tensor over the lanes of a warp, its dimensions in the tensor's order."""

    per_thread: tuple[int, ...]
    lanes: tuple[int, ...]
    order: tuple[int, ...]


@dataclasses.dataclass
class Op:
    """One operation, its operands and results (with types) by id, the blocks of its regions by theirs."""

    name: str
    operands: list[int]
    results: list[tuple[int, str]]
    blocks: list[int]
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    """Integer attributes of operations in `NUMBERED`."""

    def number(self, attribute: str) -> int:
        """An integer attribute. Raises ValueError if there is none of that name."""
        if attribute not in self.numbers:
            raise ValueError(f"{self.name} has no attribute {attribute}")
        return self.numbers[attribute]


def parse_layout(type_text: str) -> LaneLayout | None:
    """The layout of a tensor type, blocked or of an mma.sync's sums, and slices of these; None for any other kind."""
    blocked = re.search(
        r"#ttg\.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
        r"warpsPerCTA = \[[\d, ]+\], order = \[([\d, ]+)\]",
        type_text,
    )
    if blocked is not None:
        per_thread, lanes, order = (tuple(map(int, text.split(","))) for text in blocked.groups())
    elif "#ttg.nvidia_mma<{versionMajor = 2" in type_text:
        per_thread, lanes, order = (1, 2), (8, 4), (1, 0)
    else:
        return None
    for dim in reversed([int(d) for d in re.findall(r"#ttg\.slice<\{dim = (\d+)", type_text)]):
        per_thread, lanes = (t[:dim] + t[dim + 1 :] for t in (per_thread, lanes))
        order = tuple(d - (d > dim) for d in order if d != dim)
    return LaneLayout(per_thread, lanes, order)


def _constants(ttgir: str) -> list[int | None]:
    """Every constant of a module in order, one number for all elements of a tensor; None for any other value."""
    words = re.findall(r"= arith\.constant (?:\{[^}]*\} )?(?:dense<([^>]*)>|(\S+))", ttgir)
    named = {"true": 1, "false": 0}
    texts = [dense or scalar for dense, scalar in words]
    return [named[t] if t in named else int(t) if re.fullmatch(r"-?\d+", t) else None for t in texts]


NUMBERED = ("tt.get_program_id", "tt.get_num_programs", "tt.make_range", "tt.expand_dims")
"""Operations whose integer attributes are read; they have no regions, so a walk meets them in the order of the text."""


def numbered(text: str) -> dict[str, list[dict[str, int]]]:
    """The integer attributes of every operation of `NUMBERED`, in order, from the text: Triton 3.6 exposes no more."""
    found: dict[str, list[dict[str, int]]] = {name: [] for name in NUMBERED}
    for name, rest in re.findall(rf"= ({'|'.join(map(re.escape, NUMBERED))})\b(.*)", text):
        numbers = {key: int(number) for key, number in re.findall(r"(\w+) = (-?\d+)", rest)}
        if axis := re.match(r" ([xyz]) ", rest):
            numbers["axis"] = "xyz".index(axis.group(1))
        found[name].append(numbers)
    return found


def shape_of(type_text: str) -> tuple[int, ...]:
    found = re.match(r"tensor<((?:\d+x)+)", type_text)
    return tuple(int(n) for n in found.group(1).rstrip("x").split("x")) if found else ()


def integer_bits(type_text: str) -> int | None:
    """Width of an integer, of a tensor's elements or of a pointer's element; None for floats."""
    found = re.match(r"(?:tensor<(?:\d+x)+)?i(\d+)\b", type_text)
    return int(found.group(1)) if found else None


def item_bytes(pointer_text: str) -> int:
    found = re.search(r"!tt\.ptr<\w*?(\d+)", pointer_text)
    return max(1, int(found.group(1)) // 8) if found else 1


class Module:
    """One function: `entry` is its first block, `blocks` the operations of each block in order."""

    def __init__(self, text: str) -> None:
        from triton._C.libtriton import ir, nvidia

        self._context = ir.context()
        ir.load_dialects(self._context)
        nvidia.load_dialects(self._context)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "module.mlir"
            path.write_text(text)
            self._module = ir.parse_mlir_module(str(path), self._context)
        self.blocks: dict[int, list[Op]] = {}
        self.arguments: dict[int, list[int]] = {}
        """Of each block."""
        self.types: dict[int, str] = {}
        self._blocks_of: dict[int, list[int]] = {}  # region -> blocks
        self._constant_ids: list[int] = []
        self._entries: list[int] = []
        self._numbers = {name: iter(each) for name, each in numbered(text).items()}
        self._module.walk(self._see)
        if any(next(left, None) is not None for left in self._numbers.values()):
            raise ValueError("the text has more numbered operations than the module")
        self.constants = dict(zip(self._constant_ids, _constants(text), strict=True))
        """Of every constant; None for what is not one integer."""
        if len(self._entries) != 1:
            raise ValueError(f"expected one function of one block, found {len(self._entries)} blocks")
        self.entry = self._entries[0]

    def _see(self, handle: Any) -> None:
        """Children come before parents, and operations of a block in order."""
        operands = [handle.get_operand(i).id() for i in range(handle.get_num_operands())]
        values = [handle.get_result(i) for i in range(handle.get_num_results())]
        regions = [handle.get_region(i).id() for i in range(handle.get_num_regions())]
        blocks = [block for region in regions for block in self._blocks_of.get(region, [])]
        op = Op(handle.get_name(), operands, [(v.id(), str(v.get_type())) for v in values], blocks)
        op.numbers = next(self._numbers[op.name]) if op.name in NUMBERED else {}
        if op.name == "tt.func":
            self._entries += blocks
        block = handle.get_block()
        if block is None:
            return
        if block.id() not in self.blocks:
            arguments = [block.get_argument(i) for i in range(block.get_num_arguments())]
            self.blocks[block.id()] = []
            self.arguments[block.id()] = [a.id() for a in arguments]
            self.types.update((a.id(), str(a.get_type())) for a in arguments)
            self._blocks_of.setdefault(block.get_parent().id(), []).append(block.id())
        self.blocks[block.id()].append(op)
        self.types.update(op.results)
        if op.name == "arith.constant":
            self._constant_ids.append(op.results[0][0])
