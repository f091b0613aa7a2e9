"""Translates a basic block to a Python function over arrays: control, moves, memory and warp-wide operations.

Arithmetic is in `forms.py`. Every register is a NumPy array with one entry a lane, or a scalar if all lanes agree. A
value keeps the type that it was computed in, and is viewed as another type where PTX does so.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from benchmarks.aot.ptx.arithmetic import UNSIGNED, f4, f8, u4
from benchmarks.aot.ptx.forms import FORMS, Arithmetic
from benchmarks.aot.ptx.program import TYPES, Instruction, Program, PtxError, home, size_of, split_operands

SPECIAL = {"%tid.x": "E.tid", "%ctaid.x": "E.cta_x", "%ctaid.y": "E.cta_y", "%ctaid.z": "E.cta_z",
           "%nctaid.x": "E.grid_x", "%nctaid.y": "E.grid_y", "%nctaid.z": "E.grid_z", "%ntid.x": "E.num_threads",
           "%laneid": "(E.tid & u4(31))"}  # fmt: skip
EXIT = 1 << 30
"""Index of the block after the last."""


class Translator(Arithmetic):
    """Translates one program; the functions' source refers to `constants` and `instructions`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.instructions: dict[str, Instruction] = {}
        self.constants: dict[str, Any] = {}

    def block(self, k: int) -> tuple[str, list[str], list[str]]:
        """(source of `b<k>(E, registers read)`, those registers, registers that it returns after the next block)."""
        self.type, self.lines, self.k = {}, [], k
        reads = sorted(self.program.use[k])
        for name in reads:
            self.type[name] = home(name)
        end = "('next',)"
        for inst in self.program.blocks[k]:
            end = self._instruction(inst) or end
        outs = sorted(self.program.define[k] & self.program.live_out[k])
        self.lines += [f"{o} = {o}.view({home(o)})" for o in outs if self.type[o] != home(o)]
        body = "\n    ".join([*self.lines, f"return {end}, ({''.join(o + ', ' for o in outs)})"])
        return f"def b{k}(E{''.join(', ' + r for r in reads)}):\n    {body}\n", reads, outs

    def _instruction(self, inst: Instruction) -> str | None:
        if not re.fullmatch(FORMS.get(inst.parts[0], "(?!)"), inst.op):
            raise inst.error("this form is not known")
        return getattr(self, f"op_{inst.parts[0]}")(inst, inst.parts, inst.args)

    def get(self, text: str, t: str) -> str:
        """An operand as type t: its low bits if it is wider."""
        if text in SPECIAL:
            return SPECIAL[text] if t == "u4" else f"{SPECIAL[text]}.view({t})"
        if not text.startswith("%") and text != "tmp":
            return self.constant(text, t)
        name = text.lstrip("%")
        have = self.type.get(name) or home(name)
        if have == t:
            return name
        if "b" in (t, have) or size_of(have) < size_of(t):
            raise PtxError(f"{text}, a {have}, where a {t} is wanted")
        if size_of(have) == size_of(t):
            return f"{name}.view({t})"
        return f"{name}.view(u{size_of(have)}).astype(u{size_of(t)}).view({t})"

    def constant(self, text: str, t: str) -> str:
        """A literal as a NumPy scalar, by name."""
        if t == "b":
            return "false_" if text in ("0", "false") else "true_"
        if text in ("global_smem", "__local_depot0"):
            text = "0"
        text = text.rstrip("U")
        if text.startswith("0f"):
            value = np.array(int(text[2:], 16), u4).view(f4)
        elif text.startswith("0d"):
            raise PtxError(f"{text}: double precision is not known")
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text):
            value = np.array(int(text, 0) % 2 ** (8 * size_of(t)), UNSIGNED[size_of(t)])
        else:
            raise PtxError(f"operand {text!r} is not known")
        value = value.view(t) if value.dtype.itemsize == size_of(t) else value.astype(f8).astype(t)
        name = f"c_{t}_{re.sub(r'[^0-9A-Za-z]', 'm', text)}"
        self.constants[name] = value[()]
        return name

    def set(self, dst: str, expression: str, t: str, inst: Instruction) -> None:
        """Assign an expression of type t to a register; where the predicate is false it keeps its value."""
        if dst == "_":
            return
        name = dst.lstrip("%")
        if inst.predicate:
            expression = f"np.where({self.predicate(inst)}, {expression}, {self.get(dst, t)})"
        self.lines.append(f"{name} = {expression}")
        self.type[name] = t

    def predicate(self, inst: Instruction) -> str:
        """The instruction's guard."""
        assert inst.predicate is not None
        name, negated = inst.predicate
        return f"~{name}" if negated else name

    def name_of(self, inst: Instruction) -> str:
        """A name for the instruction in the functions' source."""
        name = f"I_{len(self.instructions)}"
        self.instructions[name] = inst
        return name

    # Control.
    def op_bra(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> str:
        to = self.program.labels[a[0]]
        return f"('bra', {self.predicate(inst) if inst.predicate else 'true_'}, {to}, {self.k + 1})"

    def op_ret(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> str:
        return f"('bra', {self.predicate(inst) if inst.predicate else 'true_'}, {EXIT}, {self.k + 1})"

    op_exit = op_ret

    def op_bar(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> str | None:
        if inst.predicate:
            raise inst.error("a barrier under a predicate is not known")
        if parts[1] == "warp":
            self.lines.append(f"E.whole_warps({self.name_of(inst)})")
            return None
        if a != ("0",):
            raise inst.error("only barrier 0 of all threads is known")
        return "('bar',)"

    # Moves and selections.
    def op_mov(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        t = TYPES[parts[1]]
        size = size_of(t)
        if a[0].startswith("{"):
            names = split_operands(a[0][1:-1])
            source, w = self.get(a[1], f"u{size}"), size // len(names)
            for j, name in enumerate(names):
                self.set(name, f"({source} >> u{size}({8 * w * j})).astype(u{w})", f"u{w}", inst)
            return
        if a[1].startswith("{"):
            names = split_operands(a[1][1:-1])
            w = size // len(names)
            terms = [f"({self.get(s, f'u{w}')}.astype(u{size}) << u{size}({8 * w * j}))" for j, s in enumerate(names)]
            self.set(a[0], " | ".join(terms), f"u{size}", inst)
            return
        if a[1].startswith("%") and a[1] not in SPECIAL and t != "b":
            name = a[1].lstrip("%")
            t = self.type.get(name) or home(name)  # it keeps its known type
        self.set(a[0], self.get(a[1], t), t, inst)

    def op_cvta(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        """The generic address of a local one; no supported instruction reads through it."""
        self.set(a[0], self.get(a[1], "u8"), "u8", inst)

    # Memory.
    def _vector(self, parts: list[str]) -> tuple[int, int]:
        """(words, bytes of a word)"""
        num = next((int(p[1:]) for p in parts if re.fullmatch(r"v[248]", p)), 1)
        return num, size_of(TYPES[parts[-1]])

    def _address(self, text: str, t: str) -> str:
        m = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if m is None:
            raise PtxError(f"address {text!r} is not known")
        base, offset = self.get(m[1], t), int(m[2] or 0)
        return f"({base} + {self.constant(str(offset), t)})" if offset else base

    def op_ld(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        if len(a) > 2 and not re.fullmatch(r"%rd\d+", a[2]):  # a cache policy changes no value
            raise inst.error("a third operand is not known")
        names = split_operands(a[0].strip("{} ")) if a[0].startswith("{") else [a[0]]
        if parts[1] == "param":
            self._load_parameter(inst, names[0], a[1], TYPES[parts[-1]])
            return
        num, width = self._vector(parts)
        space, regs = next(p for p in parts if p in ("global", "shared", "local")), [n.lstrip("%") for n in names]
        if len(names) != num:
            raise inst.error(f"{len(names)} registers for {num} words")
        address = self._address(a[1], "u4" if space == "shared" else "u8")
        old = "None"
        if inst.predicate:
            known = (
                self.get(n, f"u{width}") if size_of(home(r)) >= width else "" for n, r in zip(names, regs, strict=True)
            )
            old = f"({', '.join(known)},)"
        mask = self.predicate(inst) if inst.predicate else "None"
        call = f"E.load({space!r}, {address}, {width}, {num}, {mask}, {old}, {self.name_of(inst)})"
        self.lines.append(f"{', '.join(regs)}, = {call}")
        t = TYPES[parts[-1]]
        for name in regs:
            to = home(name)
            if size_of(to) != width:  # a narrow word is extended to its register by its sign, or with zeros
                self.lines.append(f"{name} = {name}.view({t}).astype({t[0]}{size_of(to)}).view({to})")
            self.type[name] = to

    def _load_parameter(self, inst: Instruction, name: str, address: str, t: str) -> None:
        m = re.fullmatch(r"\[(\w+)\]", address)
        place = [n for _, n in self.program.params].index(m[1]) if m else -1
        if place < 0:
            raise inst.error("part of a parameter is not known")
        to = home(name.lstrip("%"))
        value = f"E.params[{place}].view({t})"
        if size_of(to) != size_of(t):
            value = f"{value}.astype({t[0]}{size_of(to)})"
        self.set(name, f"{value}.view({to})", to, inst)

    def op_st(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        num, width = self._vector(parts)
        space = next(p for p in parts if p in ("global", "shared", "local"))
        names = split_operands(a[1].strip("{} ")) if a[1].startswith("{") else [a[1]]
        if len(names) != num or len(a) > 2:
            raise inst.error(f"{len(names)} registers for {num} words, or a third operand")
        address = self._address(a[0], "u4" if space == "shared" else "u8")
        values = ", ".join(self.get(name, f"u{width}") for name in names)
        mask = self.predicate(inst) if inst.predicate else "None"
        self.lines.append(f"E.store({space!r}, {address}, ({values},), {width}, {mask}, {self.name_of(inst)})")

    def op_ldmatrix(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        num = next(int(p[1:]) for p in parts if re.fullmatch(r"x[124]", p))
        names = split_operands(a[0].strip("{} "))
        regs = ", ".join(name.lstrip("%") for name in names)
        self.lines.append(
            f"{regs}, = E.ldmatrix({self._address(a[1], 'u4')}, {num}, {'trans' in parts}, {self.name_of(inst)})"
        )
        for name in names:
            self.type[name.lstrip("%")] = "u4"

    def op_stmatrix(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        values = ", ".join(self.get(name, "u4") for name in split_operands(a[1].strip("{} ")))
        self.lines.append(
            f"E.stmatrix({self._address(a[0], 'u4')}, ({values},), {'trans' in parts}, {self.name_of(inst)})"
        )

    def op_cp(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        if parts[2] == "commit_group":
            self.lines.append("E.commit_copies()")
        elif parts[2] == "wait_group":
            self.lines.append(f"E.wait_copies({int(a[0], 0)})")
        else:
            num_bytes = int(a[2], 0)
            size = self.get(a[3], "u4") if len(a) > 3 else self.constant(str(num_bytes), "u4")
            addresses = f"{self._address(a[0], 'u4')}, {self._address(a[1], 'u8')}"
            mask = self.predicate(inst) if inst.predicate else "None"
            self.lines.append(f"E.copy({addresses}, {num_bytes}, {size}, {mask}, {self.name_of(inst)})")

    # Warps.
    def op_shfl(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        """A shuffle of the whole warp: the clamps are 31 and 0 (for `up`) and the mask is -1."""
        if a[3] != ("0" if parts[2] == "up" else "31") or a[4] not in ("-1", "0xFFFFFFFF", "0xffffffff"):
            raise inst.error("only exchanges of the whole warp are known")
        exchange = f"E.shuffle({parts[2]!r}, {self.get(a[1], 'u4')}, {self.get(a[2], 'u4')}, {self.name_of(inst)})"
        self.set(a[0], exchange, "u4", inst)

    def op_mma(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        """d = a b + c of a warp, as fragments of 32-bit registers; c and d are fp32."""
        fragments = [[name.strip() for name in split_operands(x.strip("{} "))] for x in a]
        types = "u4", "u4", "f4"
        given = ", ".join(
            f"({', '.join(self.get(name, t) for name in names)},)"
            for names, t in zip(fragments[1:], types, strict=True)
        )
        made = [name.lstrip("%") for name in fragments[0]]
        self.lines.append(f"{', '.join(made)}, = E.mma({parts[-2]!r}, {given}, {self.name_of(inst)})")
        self.type.update(dict.fromkeys(made, "f4"))

    def op_redux(self, inst: Instruction, parts: list[str], a: tuple[str, ...]) -> None:
        t = TYPES[parts[-1]]
        reduced = f"E.reduce({parts[2]!r}, {self.get(a[1], t)}, {self.get(a[2], 'u4')}, {self.name_of(inst)})"
        self.set(a[0], reduced, t, inst)
