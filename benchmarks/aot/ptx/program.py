"""The text of one compiled kernel as basic blocks of instructions, with the registers that live between them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re

TYPES = {"b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4",
         "s32": "i4", "b64": "u8", "u64": "u8", "s64": "i8", "f16": "f2", "f32": "f4", "pred": "b"}  # fmt: skip
"""PTX type -> our name for it."""
HOMES = {"p": "b", "rs": "u2", "r": "u4", "rd": "u8", "SP": "u8", "SPL": "u8", "tmp": "u2"}
"""Register name without its number -> its type between blocks."""


class PtxError(RuntimeError):
    """A fault or undefined behaviour on a GPU, or a form that this machine does not support."""


def size_of(type_: str) -> int:
    """Bytes of one of our types."""
    return int(type_[1]) if type_ != "b" else 1


def home(name: str) -> str:
    """Type of a register between blocks."""
    stem = name.rstrip("0123456789")
    if stem not in HOMES:
        raise PtxError(f"register %{name} is not known")
    return HOMES[stem]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of PTX."""

    predicate: tuple[str, bool] | None
    """Register and whether it is negated."""
    op: str
    """Opcode with all its modifiers: `ld.global.v4.b32`."""
    args: tuple[str, ...]
    line: int
    source: str
    """Its line in the kernel's Python."""

    @functools.cached_property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.op.split(".")

    def error(self, reason: str) -> PtxError:
        """An exception that names the instruction and its fault."""
        return PtxError(f"line {self.line} ({self.source}): {self.op} {', '.join(self.args)}: {reason}")


def split_operands(text: str) -> list[str]:
    """Operands, split at commas outside brackets."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            out.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*out, last] if last else out


def registers(text: str) -> set[str]:
    """Names of the registers in an operand, without %."""
    return set(re.findall(r"%((?:p|rs|rd|r)\d+|SPL?)\b", text)) | set(re.findall(r"\b(tmp)\b", text))


_NO_RESULT = {"cp", "st", "stmatrix", "bra", "ret", "exit", "bar"}
_ENDS = {"bra", "ret", "exit"}


def operands(inst: Instruction) -> tuple[set[str], set[str]]:
    """(registers written, registers read)"""
    if inst.parts[0] in _NO_RESULT:
        return set(), set().union(*(registers(a) for a in inst.args))
    return registers(inst.args[0]), set().union(*(registers(a) for a in inst.args[1:]))


def body_of(text: str) -> str:
    """The text that two equal programs of two chips share: everything except the headers and the debug sections."""
    start, end = text.find(".visible .entry"), text.find("\n\t.section")
    return text[max(start, 0) : end if end > 0 else None]


def digest(text: str, shared: int) -> str:
    """Name of a program; equal programs of several chips have the same name."""
    return hashlib.sha1(f"{shared} {body_of(text)}".encode()).hexdigest()[:12]


class Program:
    """One entry point. Raises `PtxError` for text that is not supported."""

    def __init__(self, text: str) -> None:
        head = re.search(r"\.entry\s+(\S+?)\s*\((.*?)\)\s*(.*?)\{", text, re.S)
        if head is None:
            raise PtxError("no entry")
        if re.search(r"\.func\b", text):
            raise PtxError("device functions are not known")
        self.name = head[1]
        found = re.finditer(r"\.param\s+\.(\w+)[^,\n]*?(\w+_param_\d+)", head[2])
        self.params = [(m[1], m[2]) for m in found]
        """(type, name) in order."""
        need = re.search(r"\.reqntid\s+(\d+)", head[3])
        if need is None:
            raise PtxError(f"{self.name}: no .reqntid")
        self.threads = int(need[1])
        local = re.search(r"\.local\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", text)
        self.local_bytes = int(local[1]) if local else 0
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        self._read(text[head.end() :].split("$L__func_end0")[0], text[: head.end()].count("\n") + 1)
        self._liveness()

    def _read(self, body: str, first_line: int) -> None:
        source, buffer = "", ""
        for number, raw in enumerate(body.split("\n"), first_line):
            line = raw.split("//")[0].strip()
            if line.startswith(".loc"):
                source = raw.split("//")[-1].strip()
                continue
            label = re.match(r"(\$\w+):$", line)
            if label:
                if label[1].startswith("$L__BB"):
                    self._new_block()
                    self.labels[label[1]] = len(self.blocks) - 1
                continue
            buffer = self._statements(f"{buffer} {line}", number, source)
        if buffer.strip(" {}"):
            raise PtxError(f"{self.name}: cannot read {buffer.strip()[:60]!r}")
        if len(self.blocks) > 1 and not self.blocks[-1]:
            self.blocks.pop()

    def _new_block(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    def _statements(self, buffer: str, number: int, source: str) -> str:
        """Consume whole statements; returns the rest, which continues on the next line."""
        while m := re.match(r"\s*[{}]?\s*([^;{}]*(?:\{[^{};]*\}[^;{}]*)*);", buffer):
            buffer, statement = buffer[m.end() :], m[1].strip()
            if not statement or statement.startswith("."):
                continue
            inst = self._instruction(statement, number, source)
            self.blocks[-1].append(inst)
            if inst.parts[0] in _ENDS or inst.op == "bar.sync":
                self._new_block()
        return "" if re.fullmatch(r"[\s{}]*", buffer) else buffer

    def _instruction(self, text: str, number: int, source: str) -> Instruction:
        m = re.match(r"(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if m is None:
            raise PtxError(f"line {number}: cannot read {text!r}")
        predicate = (m[2], bool(m[1])) if m[2] else None
        op = m[3].replace("::cta", "")  # a CTA's own shared memory, which is the default; Triton 3.8 writes it
        return Instruction(predicate, op, tuple(split_operands(m[4])), number, source)

    def successors(self, k: int) -> list[int]:
        """Blocks that may follow block k."""
        last = self.blocks[k][-1] if self.blocks[k] else None
        following = [k + 1] if k + 1 < len(self.blocks) else []
        if last is None or last.parts[0] not in _ENDS:
            return following
        to = [self.labels[last.args[0]]] if last.parts[0] == "bra" else []
        return to + following if last.predicate else to

    def sources(self) -> list[str]:
        """Source line of each block: of its first instruction that has one, else its predecessor's."""
        before: list[list[Instruction]] = [[] for _ in self.blocks]
        for p, block in enumerate(self.blocks):
            for k in self.successors(p):
                before[k] += block[-1:]
        made = []
        for block, others in zip(self.blocks, before, strict=True):
            sources = (inst.source for inst in [*block, *others])
            made.append(next((s for s in sources if s and ":0" not in s.split(" @")[0]), ""))
        return made

    def _liveness(self) -> None:
        """`use`, `define`, `live_out`: registers that each block reads, sets, and passes on."""
        num = len(self.blocks)
        self.use, self.define = [set() for _ in range(num)], [set() for _ in range(num)]
        for k, block in enumerate(self.blocks):
            for inst in block:
                written, read = operands(inst)
                if inst.predicate:
                    read = read | {inst.predicate[0]} | written
                self.use[k] |= read - self.define[k]
                self.define[k] |= written
        live_in, self.live_out = [set() for _ in range(num)], [set() for _ in range(num)]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(num)):
                out = set().union(*(live_in[s] for s in self.successors(k)))
                new = self.use[k] | (out - self.define[k])
                changed |= new != live_in[k] or out != self.live_out[k]
                live_in[k], self.live_out[k] = new, out
