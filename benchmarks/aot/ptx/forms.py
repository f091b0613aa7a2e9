"""The arithmetic half of the translator, and the list of every supported form; any other form raises.

It has one method for each opcode, which writes a line of Python for the instruction. Approximate functions are computed
in float64 and rounded, within the tolerance of their specification.
"""

from __future__ import annotations

import functools

from benchmarks.aot.ptx.program import TYPES, Instruction, home, size_of

_S, _U = "s(16|32|64)", "u(16|32|64)"
_I = f"({_S}|{_U})"
_B = "b(16|32|64)"
_SPACE = "(global|shared|local)"
_MIXED = r"rn\.f32\.b?f16"
"""A sum whose first operand has 16 bits and whose second is fp32: sm_100 and later."""
_NARROW = r"(rn\.)?b?f16(x2)?"
_COMPARE = "(eq|ne|lt|le|gt|ge)"

FORMS = {
    # Control, moves, memory, warps: `translate.py`.
    "bra": r"bra(\.uni)?",
    "ret": "ret",
    "exit": "exit",
    "bar": r"bar\.(sync|warp\.sync)",
    "mov": r"mov\.(pred|[bu](16|32|64)|f32)",
    "cvta": r"cvta\.local\.u64",
    "ld": rf"ld\.(param\.[bus](16|32|64)|{_SPACE}(\.L1::\w+|\.L2::\w+)*(\.v[248])?\.[bus](8|16|32|64))",
    "st": rf"st\.{_SPACE}(\.L1::\w+)*(\.v[248])?\.[bus](8|16|32|64)",
    "ldmatrix": r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16",
    "stmatrix": r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16",
    "cp": r"cp\.async\.(c[ag]\.shared\.global(\.L2::\w+)*|commit_group|wait_group)",
    "shfl": r"shfl\.sync\.(bfly|idx|up|down)\.b32",
    "mma": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32",
    "redux": r"redux\.sync\.((add|min|max)\.[su]32|(and|or|xor)\.b32)",
    # Integers and bits.
    "add": rf"add\.({_I}|(rn\.)?f32(x2)?|{_NARROW}|{_MIXED})",
    "sub": rf"sub\.({_I}|(rn\.)?f32(x2)?|{_NARROW}|{_MIXED})",
    "mul": rf"mul\.((lo|hi)\.[su](16|32|64)|wide\.[su](16|32)|(rn\.)?f32(x2)?|{_NARROW})",
    "mad": r"mad\.(lo\.[su](16|32|64)|wide\.[su](16|32))",
    "div": rf"div\.({_I}|(full|approx|rn)\.f32)",
    "rem": rf"rem\.{_I}",
    "min": rf"min\.({_I}|[su]16x2|relu\.s32|(NaN\.)?f32)",
    "max": rf"max\.({_I}|[su]16x2|relu\.s32|(NaN\.)?f32)",
    "neg": r"neg\.(s(16|32|64)|f32)",
    "abs": r"abs\.(s(16|32|64)|(ftz\.)?f32)",
    "not": rf"not\.(pred|{_B})",
    "and": rf"and\.(pred|{_B})",
    "or": rf"or\.(pred|{_B})",
    "xor": rf"xor\.(pred|{_B})",
    "shl": rf"shl\.{_B}",
    "shr": r"shr\.[bus](16|32|64)",
    "bfe": r"bfe\.[su]32",
    "bfi": r"bfi\.b32",
    "lop3": r"lop3\.b32",
    "shf": r"shf\.[lr]\.(wrap|clamp)\.b32",
    "prmt": r"prmt\.b32",
    "popc": r"popc\.b32",
    # Comparisons and selections.
    "setp": rf"setp\.({_COMPARE}\.{_S}|(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.{_U}|(eq|ne)\.{_B}"
    rf"|({_COMPARE}u?|num|nan)\.(f32|f16|f16x2|bf16|bf16x2))",
    "selp": r"selp\.([bus](16|32|64)|f32)",
    # Floats.
    "fma": r"fma\.rn((\.ftz)?\.f32|\.f32x2|\.b?f16(x2)?)",
    "sqrt": r"sqrt\.(approx(\.ftz)?|rn)\.f32",
    "rsqrt": r"rsqrt\.approx(\.ftz)?\.f32",
    "rcp": r"rcp\.(approx(\.ftz)?|rn)\.f32",
    "ex2": r"ex2\.approx(\.ftz)?\.f32",
    "lg2": r"lg2\.approx(\.ftz)?\.f32",
    "cvt": r"cvt\.([su](8|16|32|64)\.[su](8|16|32|64)|rn\.f32\.[su](16|32|64)|r[znmp]i\.[su]32\.f32|f32\.(f16|bf16)"
    r"|rn\.(f16|bf16|f16x2|bf16x2)\.f32)",
}
"""Opcode -> a regular expression for the rest."""


_WIDENED = {"bf16": "from_bf16({})", "f16": "{}.view(f2).astype(f4)"}
"""Type of 16 bits -> its value as fp32."""


_ONES = {"bf16": ("3F80", "BF80"), "f16": ("3C00", "BC00")}
"""Bits of 1 and -1."""


class Arithmetic:
    """Mixin of `Translator`, which has `get`, `set`, `constant` and `lines`."""

    def _packed(self, inst: Instruction, function: str) -> None:
        """Call a function on both fp32 halves of 64-bit registers."""
        given = ", ".join(self.get(x, "u8") for x in inst.args[1:])
        self.set(inst.args[0], f"packed({function}, {given})", "u8", inst)

    def _narrow(self, inst: Instruction, symbol: str = "") -> bool:
        """A sum, product or fused product of 16-bit floats, if the instruction is one. symbol: none for the fused."""
        kind, pairs = inst.parts[-1].removesuffix("x2"), inst.parts[-1].endswith("x2")
        if kind not in _WIDENED or inst.parts[-2] == "f32":
            return False
        t = "u4" if pairs else "u2"
        one, minus_one, minus_zero = (f"{t}(0x{bits * (1 + pairs)})" for bits in (*_ONES[kind], "8000"))
        x, y, *z = (self.get(v, t) for v in inst.args[1:])
        given = {"": (x, y, *z), "+": (x, one, y), "-": (y, minus_one, x), "*": (x, y, minus_zero)}[symbol]
        self.set(inst.args[0], f"narrow_fma{'_pairs' * pairs}({kind!r}, {', '.join(given)})", t, inst)
        return True

    def _two(self, inst: Instruction, symbol: str) -> None:
        if self._narrow(inst, symbol):
            return
        if inst.parts[-1] == "f32x2":
            self._packed(inst, {"+": "np.add", "-": "np.subtract"}[symbol])
            return
        if inst.parts[-1] in _WIDENED:
            x = _WIDENED[inst.parts[-1]].format(self.get(inst.args[1], "u2"))
            self.set(inst.args[0], f"({x} {symbol} {self.get(inst.args[2], 'f4')})", "f4", inst)
            return
        t = TYPES[inst.parts[-1]]
        self.set(inst.args[0], f"({self.get(inst.args[1], t)} {symbol} {self.get(inst.args[2], t)})", t, inst)

    def _call(self, inst: Instruction, function: str, t: str) -> None:
        """Call a function of all operands, which have the type of the result."""
        given = ", ".join(self.get(x, t) for x in inst.args[1:])
        self.set(inst.args[0], f"{function}({given})", t, inst)

    def op_add(self, inst, parts, a):
        self._two(inst, "+")

    def op_sub(self, inst, parts, a):
        self._two(inst, "-")

    def op_popc(self, inst, parts, a):
        self.set(inst.args[0], f"np.bitwise_count({self.get(inst.args[1], 'u4')}).astype('u4')", "u4", inst)

    def op_and(self, inst, parts, a):
        self._two(inst, "&")

    def op_or(self, inst, parts, a):
        self._two(inst, "|")

    def op_xor(self, inst, parts, a):
        self._two(inst, "^")

    def op_mul(self, inst, parts, a):
        if parts[-1] == "f32x2":
            self._packed(inst, "np.multiply")
            return
        if self._narrow(inst, "*"):
            return
        t = TYPES[parts[-1]]
        size = 2 * int(t[1])
        if parts[1] == "wide" or (parts[1] == "hi" and size <= 8):
            wide = f"{t[0]}{size}"
            product = f"({self.get(a[1], t)}.astype({wide}) * {self.get(a[2], t)}.astype({wide}))"
            if parts[1] == "wide":
                self.set(a[0], product, wide, inst)
            else:
                self.set(a[0], f"({product} >> {wide}({4 * size})).astype({t})", t, inst)
        elif parts[1] == "hi":
            self._call(inst, "high_product", t)
        else:
            self._two(inst, "*")

    def op_mad(self, inst, parts, a):
        t = TYPES[parts[-1]]
        wide = f"{t[0]}{2 * int(t[1])}" if parts[1] == "wide" else t
        x, y = (f"{self.get(v, t)}.astype({wide})" for v in a[1:3])
        self.set(a[0], f"({x} * {y} + {self.get(a[3], wide)})", wide, inst)

    def op_div(self, inst, parts, a):
        t = TYPES[parts[-1]]
        if t == "f4":
            self.set(a[0], f"({self.get(a[1], t)}.astype(f8) / {self.get(a[2], t)}).astype(f4)", t, inst)
        else:
            self._call(inst, "divide", t)

    def op_rem(self, inst, parts, a):
        self._call(inst, "remainder", TYPES[parts[-1]])

    def _extreme(self, inst, word):
        if inst.parts[-1].endswith("16x2"):
            kind, (x, y) = {"s": "i2", "u": "u2"}[inst.parts[-1][0]], (self.get(v, "u4") for v in inst.args[1:])
            return self.set(inst.args[0], f"packed_halves(np.{word}imum, {kind}, {x}, {y})", "u4", inst)
        t = TYPES[inst.parts[-1]]
        function = f"np.f{word}" if t == "f4" and "NaN" not in inst.parts else f"np.{word}imum"
        values = (self.get(x, t) for x in inst.args[1:])  # two, or on sm_120 three
        extreme = functools.reduce(lambda x, y: f"{function}({x}, {y})", values)
        self.set(inst.args[0], f"np.maximum({extreme}, {t}(0))" if "relu" in inst.parts else extreme, t, inst)

    def op_min(self, inst, parts, a):
        self._extreme(inst, "min")

    def op_max(self, inst, parts, a):
        self._extreme(inst, "max")

    def op_neg(self, inst, parts, a):
        t = TYPES[parts[-1]]
        self.set(a[0], f"(-{self.get(a[1], t)})", t, inst)

    def op_abs(self, inst, parts, a):
        if "ftz" in parts:
            self._float(inst, f"np.abs({self.get(a[1], 'f4')})")
        else:
            self._call(inst, "np.abs", TYPES[parts[-1]])

    def op_not(self, inst, parts, a):
        t = TYPES[parts[-1]]
        self.set(a[0], f"(~{self.get(a[1], t)})", t, inst)

    def _shift(self, inst, symbol):
        t = TYPES[inst.parts[-1]]
        self.set(
            inst.args[0], f"({self.get(inst.args[1], t)} {symbol} {self.get(inst.args[2], 'u4')}.astype({t}))", t, inst
        )

    def op_shl(self, inst, parts, a):
        self._shift(inst, "<<")

    def op_shr(self, inst, parts, a):
        self._shift(inst, ">>")

    def op_bfe(self, inst, parts, a):
        self._call(inst, "signed_bit_field" if parts[-1] == "s32" else "bit_field", "u4")

    def op_bfi(self, inst, parts, a):
        self._call(inst, "insert_bits", "u4")

    def op_prmt(self, inst, parts, a):
        self._call(inst, "permute_bytes", "u4")

    def op_lop3(self, inst, parts, a):
        """Any function of three bits, by its truth table: the terms for which it is 1."""
        x, y, z = (self.get(v, "u4") for v in a[1:4])
        table = int(a[4], 0)
        terms = [
            f"({'' if j & 4 else '~'}{x} & {'' if j & 2 else '~'}{y} & {'' if j & 1 else '~'}{z})"
            for j in range(8) if table >> j & 1
        ]  # fmt: skip
        self.set(a[0], " | ".join(terms) or "u4(0)", "u4", inst)

    def op_shf(self, inst, parts, a):
        low, high, shift = (self.get(v, "u4") for v in a[1:4])
        shift = f"({shift} & u4(31))" if parts[2] == "wrap" else f"np.minimum({shift}, u4(32))"
        self.set(a[0], f"funnel_{'left' if parts[1] == 'l' else 'right'}({low}, {high}, {shift})", "u4", inst)

    # Comparisons and selections.
    def op_selp(self, inst, parts, a):
        t = TYPES[parts[-1]]
        self.set(a[0], f"np.where({self.get(a[3], 'b')}, {self.get(a[1], t)}, {self.get(a[2], t)})", t, inst)

    def op_setp(self, inst, parts, a):
        how, t = parts[1:]
        if t in ("f16x2", "bf16x2"):
            for half, dst in zip((0, 16), a[0].split("|"), strict=True):
                x, y = (f"({self.get(v, 'u4')} >> u4({half})).astype(u2)" for v in a[1:3])
                form = "{}.view(f2)" if t == "f16x2" else "from_bf16({})"
                self.set(dst, _comparison(how, form.format(x), form.format(y), True), "b", inst)
            return
        if t == "bf16":
            x, y = (f"from_bf16({self.get(v, 'u2')})" for v in a[1:3])
        else:
            x, y = (self.get(v, TYPES[t]) for v in a[1:3])
        self.set(a[0], _comparison(how, x, y, "f" in t), "b", inst)

    # Floats.
    def op_fma(self, inst, parts, a):
        if parts[-1] == "f32x2":
            self._packed(inst, "fma")
            return
        if self._narrow(inst):
            return
        operands = [self.get(v, "f4") for v in a[1:4]]
        if "ftz" in parts:
            operands = [f"ftz({v})" for v in operands]
        self._float(inst, f"fma({', '.join(operands)})")

    def _float(self, inst, expression):
        self.set(inst.args[0], f"ftz({expression})" if "ftz" in inst.parts else expression, "f4", inst)

    def _unary(self, inst, expression):
        x = self.get(inst.args[1], "f4")
        x = f"ftz({x})" if "ftz" in inst.parts else x
        self._float(inst, f"({expression.format(f'{x}.astype(f8)')}).astype(f4)")

    def op_sqrt(self, inst, parts, a):
        self._unary(inst, "np.sqrt({})")

    def op_rsqrt(self, inst, parts, a):
        self._unary(inst, "1.0 / np.sqrt({})")

    def op_rcp(self, inst, parts, a):
        self._unary(inst, "1.0 / {}")

    def op_ex2(self, inst, parts, a):
        self._unary(inst, "np.exp2({})")

    def op_lg2(self, inst, parts, a):
        self._unary(inst, "np.log2({})")

    def op_cvt(self, inst, parts, a):
        dst, src = parts[-2:]
        if dst in ("bf16x2", "f16x2"):
            high, low = (self.get(v, "f4") for v in a[1:3])
            narrow = "to_bf16({})" if dst == "bf16x2" else "to_half({}).astype(u4)"
            self.set(a[0], f"(({narrow.format(high)} << u4(16)) | {narrow.format(low)})", "u4", inst)
        elif dst == "bf16":
            self.set(a[0], f"to_bf16({self.get(a[1], 'f4')}).astype(u2)", "u2", inst)
        elif dst == "f16":
            self.set(a[0], f"to_half({self.get(a[1], 'f4')})", "u2", inst)
        elif src == "bf16":
            self.set(a[0], f"from_bf16({self.get(a[1], 'u2')})", "f4", inst)
        elif src == "f32":
            t = TYPES[dst]
            self.set(a[0], f"to_integer({self.get(a[1], 'f4')}, {parts[1]!r}, {t})", t, inst)
        else:
            self._convert(inst, TYPES[dst], TYPES[src])

    def _convert(self, inst, to, source):
        """Convert between integers, or to fp32; a byte fills the 16 bits of its register."""
        value = f"{self.get(inst.args[1], source)}.astype({to})"
        room = size_of(home(inst.args[0].lstrip("%")))
        if size_of(to) < room:
            value, to = f"{value}.astype({to[0]}{room})", f"{to[0]}{room}"
        self.set(inst.args[0], value, to, inst)


_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
            "hs": ">="}  # fmt: skip


def _comparison(how: str, x: str, y: str, floats: bool) -> str:
    """Comparison of floats is false if either is NaN, except for operators that end in u, which are then true."""
    if how == "num":
        return f"(({x} == {x}) & ({y} == {y}))"
    if how == "nan":
        return f"~(({x} == {x}) & ({y} == {y}))"
    if floats and how == "ne":
        return f"(({x} < {y}) | ({x} > {y}))"
    if how in _SYMBOLS:
        return f"({x} {_SYMBOLS[how]} {y})"
    opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<", "neu": "=="}
    return f"~({x} {opposite[how]} {y})" if how in opposite else f"~(({x} < {y}) | ({x} > {y}))"
