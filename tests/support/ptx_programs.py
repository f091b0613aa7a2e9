"""PTX by hand: a body of instructions put into an entry, run on NumPy arrays by the machine of `benchmarks.aot.ptx`."""

from __future__ import annotations

import collections

import numpy as np

from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.memory import Memory

REGISTER = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
"""By bytes."""


def entry(body: str, num_params: int, threads: int = 32, local: int = 0) -> str:
    """The text of a kernel. Parameters are addresses, in %rd1, %rd2, ..; %r1 is the thread and %r2 the CTA."""
    params = ",\n".join(f"\t.param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(num_params))
    loads = "\n".join(f"\tld.param.b64 \t%rd{i + 1}, [kernel_param_{i}];" for i in range(num_params))
    depot = (
        f"\t.local .align 16 .b8 \t__local_depot0[{local}];\n\t.reg .b64 \t%SP;\n\t.reg .b64 \t%SPL;\n" if local else ""
    )
    return f"""
.version 8.7
.target sm_89
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{params}
)
.reqntid {threads}
{{
{depot}	.reg .pred 	%p<30>;
	.loc	1 1 0                          // hand.py:1:0
$L__func_begin0:
{loads}
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
{body}
	ret;
$L__func_end0:
}}
"""


def run(
    body: str, *arrays: np.ndarray, threads: int = 32, ctas: int = 1, shared: int = 0, local: int = 0,
    unwritten: tuple[int, ...] = (), count: bool = False,
) -> Kernel:  # fmt: skip
    """Run in place on `arrays`; those at the places `unwritten` hold nothing yet. The kernel, with its notes."""
    kernel = Kernel(entry(body, len(arrays), threads, local), shared)
    memory = Memory(True, collections.Counter())
    for i, x in enumerate(arrays):
        written = np.zeros(x.nbytes, bool) if i in unwritten else None
        memory.add(x.ctypes.data, x.nbytes, f"array {i}", x.itemsize, written)
    kernel.launch((ctas, 1, 1), [x.ctypes.data for x in arrays], memory, count=count)
    return kernel


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts on 32 bytes and has as many behind it."""
    raw = np.zeros(x.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 32
    out = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def at_lane(size: int, base: str, name: str) -> str:
    """`name` (a %rd) = base + thread * size."""
    return f"\tmul.wide.u32 \t{name}, %r1, {size};\n\tadd.s64 \t{name}, {name}, {base};\n"


def evaluate(op: str, inputs: list[np.ndarray], out: np.dtype | type, tail: str = "") -> np.ndarray:
    """`op d, a, b, ..` for 32 lanes; bool arrays are predicates. tail: further operands, as text."""
    body, names, arrays = "", [], []
    for i, x in enumerate(inputs):
        as_word = x.astype(np.uint32) if x.dtype == bool else x
        arrays.append(aligned(as_word))
        size, name = as_word.itemsize, f"%{REGISTER[as_word.itemsize]}{20 + i}"
        sign = "s" if x.dtype.kind == "i" and size == 1 else "u" if size == 1 else "b"
        body += (
            at_lane(size, f"%rd{i + 1}", f"%rd{10 + i}") + f"\tld.global.{sign}{8 * size} \t{name}, [%rd{10 + i}];\n"
        )
        if x.dtype == bool:
            body += f"\tsetp.ne.b32 \t%p{i + 1}, {name}, 0;\n"
            name = f"%p{i + 1}"
        names.append(name)
    out, flag = np.dtype(out), out is bool
    result = aligned(np.zeros(32, np.uint32 if flag else out))
    target = "%p20" if flag else f"%{REGISTER[out.itemsize]}30"
    operands = ", ".join([target, *names]) + (f", {tail}" if tail else "")
    body += f"\t{op} \t{operands};\n"
    if flag:
        body += "\tselp.b32 \t%r30, 1, 0, %p20;\n"
        target = "%r30"
    place = f"%rd{len(inputs) + 1}"
    body += at_lane(result.itemsize, place, "%rd19") + f"\tst.global.b{8 * result.itemsize} \t[%rd19], {target};\n"
    kernel = run(body, *arrays, result)
    assert not kernel.notes
    return result.astype(bool) if flag else result
