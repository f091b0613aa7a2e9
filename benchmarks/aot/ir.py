"""Reads a compiled kernel's TTGIR for its addresses: their width, and the bytes that a warp touches at once.

It is an abstract interpretation in program order. Every integer carries an interval, from the launch's grid and
arguments; every tensor carries its step along each dimension. An integer that is loaded is an index below MAX_INDEX.

* Width: 32-bit arithmetic whose interval leaves 32 bits, and that reaches an address, is a violation. So `row * stride`
  must be 64-bit, while a column offset within the width may stay 32-bit.
* Contiguity: along the dimension in which a warp's lanes are adjacent the address must advance by one element. If a
  warp touches several runs, each must fill a 32-byte sector or be the whole row of the tile. Exempt: lanes that all
  read one address, and look-ups of integers through a loaded index (a degree, a count), which no layout can make
  adjacent. The quotient of adjacent indices by one number counts as one address, their remainder as adjacent: that
  holds but where a row of the divided matrix ends.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from benchmarks.aot.mlir import LaneLayout, Module, Op, integer_bits, item_bytes, parse_layout, shape_of

MAX_INDEX = 2**29
"""Integers in memory are indices below this: `sgg_fast.ops.pack` refuses more than half as many rows."""

SECTOR = 32
"""Bytes that DRAM and L2 move at once."""

Step = int | str
"""Step of an address or an index along a dimension: elements, or STRIDED or INDIRECT (through a loaded index)."""

STRIDED, INDIRECT = "strided", "indirect"

_UNBOUNDED = 2**62

_REDUCTIONS = {"tt.reduce", "tt.scan"}
_ACCESSES = {
    "tt.load": "load",
    "tt.store": "store",
    "tt.atomic_rmw": "atomic",
    "tt.atomic_cas": "atomic",
    "ttg.async_copy_global_to_local": "load",
}


@dataclasses.dataclass(frozen=True)
class Value:
    """The abstract value of an SSA value."""

    low: int
    high: int
    steps: tuple[Step, ...] = ()
    wrapped: str | None = None
    """The 32-bit arithmetic that it depends on and that may have left 32 bits."""
    root: str | None = None
    """The argument whose storage a pointer addresses."""


@dataclasses.dataclass(frozen=True)
class Access:
    """One load or store of a tensor."""

    kind: str
    argument: str
    is_integer: bool
    item_bytes: int
    shape: tuple[int, ...]
    layout: LaneLayout | None
    steps: tuple[Step, ...]
    wrapped: str | None

    @property
    def lane_bytes(self) -> int:
        """Adjacent bytes of one lane."""
        if self.layout is None or not self.shape:
            return self.item_bytes
        fastest = self.layout.order[0]
        return self.item_bytes * min(self.layout.per_thread[fastest], self.shape[fastest])

    def problems(self) -> list[str]:
        """Its violations of the two rules."""
        found = [f"{self.kind} of {self.argument}: 32-bit offset {self.wrapped}"] if self.wrapped else []
        if not self.shape:
            return found
        if self.layout is None:
            return [*found, f"{self.kind} of {self.argument}: a layout that this check cannot read"]
        fastest = self.layout.order[0]
        lanes, step, extent = self.layout.lanes[fastest], self.steps[fastest], self.shape[fastest]
        is_look_up = self.kind == "load" and len(self.shape) == 1 and self.is_integer and step == INDIRECT
        if math.prod(self.layout.lanes) == 1 or extent == 1 or step == 0 or is_look_up:
            return found
        if step != 1:
            return [*found, f"{self.kind} of {self.argument}: adjacent lanes are {step} elements apart"]
        run = min(self.layout.per_thread[fastest] * lanes, extent) * self.item_bytes
        if math.prod(self.layout.lanes) > lanes and run < min(SECTOR, extent * self.item_bytes):
            found.append(f"{self.kind} of {self.argument}: a warp touches runs of {run} bytes")
        return found


def _top(type_text: str, varies: bool = True) -> Value:
    bits = integer_bits(type_text)
    bound = 2 ** (bits - 1) if bits and bits <= 32 else _UNBOUNDED
    low, high = (0, 1) if bits == 1 else (-bound, bound - 1)
    return Value(low, high, tuple(STRIDED if varies and n > 1 else 0 for n in shape_of(type_text)))


def _widened(value: Value, type_text: str) -> Value:
    """The value with the full range of its type."""
    top = _top(type_text)
    return dataclasses.replace(value, low=min(top.low, value.low), high=max(top.high, value.high))


def _add_steps(a: Step, b: Step) -> Step:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return INDIRECT if INDIRECT in (a, b) else STRIDED


def _mul_step(a: Step, b: Step, factor_a: Value, factor_b: Value) -> Step:
    """Step of the product of two factors with the steps a and b."""
    for step, other, factor in ((a, b, factor_b), (b, a, factor_a)):
        if isinstance(step, int) and other == 0 and (step == 0 or factor.low == factor.high):
            return step * factor.low
    return INDIRECT if INDIRECT in (a, b) else STRIDED


def _any_step(*steps: Step) -> Step:
    """Step of a function that is not linear."""
    return 0 if set(steps) == {0} else INDIRECT if INDIRECT in steps else STRIDED


def _join(a: Value, b: Value) -> Value:
    steps = tuple(x if x == y else _any_step(x, y) for x, y in zip(a.steps, b.steps, strict=True))
    return Value(min(a.low, b.low), max(a.high, b.high), steps, a.wrapped or b.wrapped, a.root or b.root)


def _div(n: int, d: int) -> int:
    """Integer division towards zero, as in hardware."""
    return abs(n) // abs(d) * (1 if (n < 0) == (d < 0) else -1)


def _corners(a: Value, b: Value, function: Any) -> tuple[int, int]:
    values = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(values), max(values)


def _interval(name: str, a: Value, b: Value) -> tuple[int, int] | None:
    """Interval of an integer operation without regard to width; None if unknown."""
    if name in ("addi", "subi", "muli"):
        return _corners(a, b, {"addi": int.__add__, "subi": int.__sub__, "muli": int.__mul__}[name])
    if name in ("divsi", "divui", "floordivsi", "ceildivsi") and b.low > 0:
        low, high = _corners(a, b, _div)
        return low - (name == "floordivsi"), high + (name == "ceildivsi")
    if name in ("remsi", "remui") and b.low > 0:
        return (0 if a.low >= 0 else 1 - b.high), min(b.high - 1, max(a.high, 0))
    if name in ("minsi", "minui", "maxsi", "maxui"):
        pick = min if name.startswith("min") else max
        return pick(a.low, b.low), pick(a.high, b.high)
    if name == "shli" and b.low == b.high and 0 <= b.low < 64:
        return a.low << b.low, a.high << b.low
    if name in ("shrsi", "shrui") and b.low == b.high and 0 <= b.low < 64 and (name == "shrsi" or a.low >= 0):
        return a.low >> b.low, a.high >> b.low
    if name == "andi" and min(a.low, b.low) >= 0:
        return 0, min(a.high, b.high)
    return None


def _fitted(name: str, interval: tuple[int, int], steps: tuple[Step, ...], wrapped: str | None, text: str) -> Value:
    """The interval if its type holds it; else the type's range, marked as wrapped."""
    bits, (low, high) = integer_bits(text) or 64, interval
    if bits > 32:
        return Value(max(low, -_UNBOUNDED), min(high, _UNBOUNDED - 1), steps, wrapped)
    if low >= -(2 ** (bits - 1)) and high < 2 ** (bits - 1):
        return Value(low, high, steps, wrapped)
    return dataclasses.replace(
        _top(text), steps=steps, wrapped=wrapped or f"{name} in {bits} bits, up to {max(-low, high):,}"
    )


class Kernel:
    """One module, interpreted at construction. `accesses` holds its loads and stores."""

    def __init__(self, ttgir: str, arguments: list[tuple[str, int | None]], grid: tuple[int, ...]) -> None:
        """Interpret a module. arguments: (name, value or None for a pointer) of the compiled function, in order."""
        self.grid = grid
        self.accesses: list[Access] = []
        self._module = Module(ttgir)
        self._values: dict[int, Value] = {}
        for i, (name, number) in zip(self._module.arguments[self._module.entry], arguments, strict=True):
            self._values[i] = Value(0, 0, root=name) if number is None else Value(number, number)
        self._record = True
        self._run(self._module.entry)

    def _run(self, block: int) -> list[Value]:
        """Interpret a block; returns the operands of its terminator."""
        for op in self._module.blocks[block]:
            if op.name in ("scf.yield", "tt.return"):
                return [self._values[i] for i in op.operands]
            for (i, text), value in zip(op.results, self._results(op), strict=True):
                if shape_of(text) and len(value.steps) != len(shape_of(text)):
                    value = _top(text)
                self._values[i] = value
        raise ValueError("a block without an end that this check knows")

    def _results(self, op: Op) -> list[Value]:
        if op.name == "scf.for":
            return self._loop(op)
        if op.name == "scf.if":
            branches = [self._run(block) for block in op.blocks]
            return [_join(a, b) for a, b in zip(*branches, strict=True)] if op.results else []
        if (op.blocks and op.name not in _REDUCTIONS) or op.name.startswith("cf.") or "descriptor" in op.name:
            raise ValueError(f"{op.name}: an operation that this check cannot follow")
        operands = [self._values[i] for i in op.operands]
        if op.name in _ACCESSES:
            self._access(op, operands[0])
        if not op.results:
            return []
        if len(op.results) > 1:
            return [_top(text) for _, text in op.results]
        return [self._single(op, operands, op.results[0][1])]

    def _loop(self, op: Op) -> list[Value]:
        """Join the initial values with those that one pass yields; changed values are widened to their type's range."""
        low, high, _ = (self._values[i] for i in op.operands[:3])
        initial = [self._values[i] for i in op.operands[3:]]
        induction, *carried = self._module.arguments[op.blocks[0]]
        self._values[induction] = Value(low.low, max(high.high - 1, low.low), (), low.wrapped or high.wrapped)
        state, record = initial, self._record
        self._record = False
        while True:
            self._values.update(zip(carried, state, strict=True))
            joined = [_join(a, b) for a, b in zip(state, self._run(op.blocks[0]), strict=True)]
            if joined == state:
                break
            # A pointer that a loop advances keeps its steps; an integer may grow to any size.
            state = [
                a if a == b else b if b.root else _widened(b, self._module.types[i])
                for i, a, b in zip(carried, state, joined, strict=True)
            ]
        self._record = record
        self._values.update(zip(carried, state, strict=True))
        self._run(op.blocks[0])
        return state

    def _access(self, op: Op, pointer: Value) -> None:
        text = self._module.types[op.operands[0]]
        if self._record:
            access = Access(
                _ACCESSES[op.name], pointer.root or "an unknown pointer", "!tt.ptr<i" in text, item_bytes(text),
                shape_of(text), parse_layout(text), pointer.steps, pointer.wrapped,
            )  # fmt: skip
            self.accesses.append(access)

    def _single(self, op: Op, operands: list[Value], text: str) -> Value:
        """The result of an operation that has one."""
        name, shape = op.name.split(".", 1)[1], shape_of(text)
        if name == "constant":
            number = self._module.constants[op.results[0][0]]
            return _top(text) if number is None else Value(number, number, (0,) * len(shape))
        if name in ("get_program_id", "get_num_programs"):
            size = self.grid[axis] if (axis := op.number("axis")) < len(self.grid) else 1
            return Value(0, size - 1) if name == "get_program_id" else Value(size, size)
        if name == "make_range":
            return Value(op.number("start"), op.number("end") - 1, (1,))
        if name == "load":
            bound = {8: 255, 16: 2**15 - 1, 32: MAX_INDEX - 1}.get(integer_bits(text) or 0, _UNBOUNDED)
            return Value(0, bound, tuple(0 if step == 0 else INDIRECT for step in operands[0].steps))
        if name == "splat":
            return dataclasses.replace(operands[0], steps=(0,) * len(shape))
        if name == "expand_dims":
            axis, steps = op.number("axis"), operands[0].steps
            return dataclasses.replace(operands[0], steps=(*steps[:axis], 0, *steps[axis:]))
        if name in ("broadcast", "convert_layout", "extsi", "index_cast", "index_castui"):
            return operands[0]
        if name == "extui":
            return operands[0] if operands[0].low >= 0 else _top(text)
        if name == "trunci":
            only = operands[0]
            return _fitted(name, (only.low, only.high), only.steps, only.wrapped, text)
        if name == "addptr":
            pointer, offset = operands
            steps = tuple(_add_steps(a, b) for a, b in zip(pointer.steps, offset.steps, strict=True))
            return Value(0, 0, steps, pointer.wrapped or offset.wrapped, pointer.root)
        if name == "select":
            return _join(*operands[1:])
        if name in ("join", "reshape") and {s for v in operands for s in v.steps} - {0} == {INDIRECT}:
            low, high = min(v.low for v in operands), max(v.high for v in operands)
            return Value(low, high, (INDIRECT,) * len(shape), next((v.wrapped for v in operands if v.wrapped), None))
        return self._arithmetic(op, name, operands, text)

    def _arithmetic(self, op: Op, name: str, operands: list[Value], text: str) -> Value:
        """Integers by their intervals; any other value may be any value of its type."""
        wrapped = next((v.wrapped for v in operands if v.wrapped), None)
        interval = _interval(name, *operands) if len(operands) == 2 and integer_bits(text) else None
        if interval is None:
            varies = any(set(v.steps) - {0} for v in operands)
            return dataclasses.replace(_top(text, varies), wrapped=wrapped)
        a, b = operands
        if name in ("addi", "subi"):
            signed = b.steps if name == "addi" else [-s if isinstance(s, int) else s for s in b.steps]
            steps = tuple(_add_steps(x, y) for x, y in zip(a.steps, signed, strict=True))
        elif name == "muli":
            steps = tuple(_mul_step(x, y, a, b) for x, y in zip(a.steps, b.steps, strict=True))
        elif name in ("divsi", "remsi") and set(a.steps) <= {0, 1} and set(b.steps) <= {0}:
            steps = (0,) * len(a.steps) if name == "divsi" else a.steps
        elif name == "shli":
            steps = tuple(x << b.low if isinstance(x, int) else x for x in a.steps)
        else:
            steps = tuple(_any_step(x, y) for x, y in zip(a.steps, b.steps, strict=True))
        return _fitted(name, interval, steps, wrapped, text)
