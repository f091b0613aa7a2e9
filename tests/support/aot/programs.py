"""PTX by hand: a body of instructions put into an entry, run on NumPy arrays by the machine of `benchmarks.aot.ptx`."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

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
	.reg .b16 	%rs<60>;
	.reg .b32 	%r<60>;
	.reg .b64 	%rd<60>;
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


def compiled(text: str, signature: dict[str, str], shared: int = 0) -> tuple[Any, Any]:
    """(kernel, compiled kernel) with the attributes of Triton's that a host reads. signature: argument -> its type."""
    kernel = SimpleNamespace(__name__="hand_kernel", arg_names=list(signature))
    asm, metadata, src = {"ptx": text}, SimpleNamespace(shared=shared), SimpleNamespace(signature=signature)
    return kernel, SimpleNamespace(asm=asm, metadata=metadata, src=src)


DOUBLED = (
    at_lane(4, "%rd1", "%rd10")
    + at_lane(4, "%rd2", "%rd11")
    + """
	mul.wide.u32 %rd12, %r2, 128;
	add.s64 %rd10, %rd10, %rd12;
	add.s64 %rd11, %rd11, %rd12;
	ld.global.b32 %r5, [%rd10];
	shl.b32 %r5, %r5, 1;
	st.global.b32 [%rd11], %r5;"""
)
"""out = 2 x of 32 words a CTA: two arguments and the two scratch pointers that Triton adds."""


INTS = {
    t: np.dtype(f"{'i' if t[0] == 's' else 'u'}{int(t[1:]) // 8}") for t in ("s16", "s32", "s64", "u16", "u32", "u64")
}
INTS |= {"b16": INTS["u16"], "b32": INTS["u32"], "b64": INTS["u64"], "s8": np.dtype("i1"), "u8": np.dtype("u1")}
EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 100, 255, 256]


def integers(t: str, turn: int) -> np.ndarray:
    """32 numbers of a type, its extremes among them, in another order each turn."""
    dtype = INTS[t]
    info, rng = np.iinfo(dtype), np.random.default_rng(turn)
    fixed = [v for v in [*EDGES, info.min, info.max, info.max - 1, -1, -7, -32] if info.min <= v <= info.max]
    drawn = rng.integers(info.min, info.max, 32 - len(fixed), dtype=dtype, endpoint=True)
    return rng.permutation(np.concatenate([np.array(fixed, dtype), drawn]))


def floats(turn: int) -> np.ndarray:
    """32 fp32 numbers: zeros, infinities, NaN, a subnormal, ties of bf16, and others."""
    rng = np.random.default_rng(100 + turn)
    fixed = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.nan,
        1e-40,
        3e38,
        1.00390625,
        1.01171875,
        0.5,
        2.5,
        -2.5,
        65520.0,
    ]
    drawn = rng.standard_normal(32 - len(fixed)) * np.exp(4 * rng.standard_normal(32 - len(fixed)))
    return rng.permutation(np.concatenate([fixed, drawn])).astype(np.float32)


def wrapped(values: list[int], dtype: np.dtype) -> np.ndarray:
    """Integers of any size as a type holds them."""
    mask = 2 ** (8 * dtype.itemsize) - 1
    return np.array([v & mask for v in values], f"u{dtype.itemsize}").view(dtype)


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


LANES = np.arange(32, dtype="u4")


def words(num: int = 32) -> np.ndarray:
    return aligned(np.arange(1, num + 1, dtype="u4") * 0x01010101)


def loop_body() -> str:
    """out[lane] = sum of 0 .. lane, each lane leaving the loop when it is done; odd lanes then add 1000."""
    return (
        at_lane(4, "%rd1", "%rd10")
        + """
	mov.b32 %r5, 0;
	mov.b32 %r6, 0;
$L__BB0_1:
	add.s32 %r6, %r6, %r5;
	add.s32 %r5, %r5, 1;
	setp.le.u32 %p1, %r5, %r1;
	@%p1 bra $L__BB0_1;
	and.b32 %r7, %r1, 1;
	setp.eq.b32 %p2, %r7, 0;
	@%p2 bra $L__BB0_3;
	add.s32 %r6, %r6, 1000;
	bra.uni $L__BB0_4;
$L__BB0_3:
	add.s32 %r6, %r6, 0;
$L__BB0_4:
	st.global.b32 [%rd10], %r6;"""
    )


EXCHANGE = at_lane(4, "%rd1", "%rd10") + at_lane(4, "%rd2", "%rd11") + """
	ld.global.b32 %r5, [%rd10];
	shl.b32 %r6, %r1, 2;
	st.shared.b32 [%r6], %r5;
	{barrier}
	xor.b32 %r7, %r6, {other};
	ld.shared.b32 %r8, [%r7];
	st.global.b32 [%rd11], %r8;"""  # fmt: skip
"""Each of 64 threads reads what another wrote: 128 is one of the other warp, 4 the neighbour."""


COPIES = at_lane(16, "%rd1", "%rd10") + at_lane(16, "%rd2", "%rd11") + """
	mul.lo.u32 %r6, %r1, 16;
	setp.eq.s32 %p1, %r1, 3;
	selp.b32 %r9, 0, 16, %p1;
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd10 + 0 ], 0x10, %r9;
	cp.async.commit_group;
	cp.async.ca.shared.global [ %r6 + 1024 ], [ %rd10 + 1024 ], 0x10;
	cp.async.commit_group;
	{wait}
	{barrier}
	xor.b32 %r7, %r6, {other};
	ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r7+{second}];
	st.global.v4.b32 [%rd11], {{%r20, %r21, %r22, %r23}};"""  # fmt: skip
"""Each of 64 threads copies 16 bytes in each of two groups, none for thread 3 in the first, and reads another's."""


ARRIVED = {"wait": "cp.async.wait_group 1;", "barrier": "bar.sync 0;", "other": 512, "second": 0}


def geglu_on_the_machine(arch: str) -> dict[str, Any]:
    """Run the operator twice on CPU tensors, in a process in which Triton compiles; what a host saw of it."""
    import torch
    from triton.runtime import jit

    from benchmarks.aot.ptx.host import Host
    from sgg_fast import ops
    from sgg_fast.ops import dispatch

    host, replaced = Host(arch), (jit.JITFunction.run, dispatch.why_not_triton, torch.empty)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    value, gate = x.chunk(2, -1)
    with host.taking_over() as taken:
        ops.use_kernels("triton")
        assert taken is host
        found = [ops.geglu(x) for _ in range(2)]
    return {
        "kernels": list(host.names.values()),
        "launches": host.launches,
        "off by": max((y - value * torch.nn.functional.gelu(gate)).abs().max().item() for y in found),
        "fresh": len(host.fresh.tensors),
        "given back": replaced == (jit.JITFunction.run, dispatch.why_not_triton, torch.empty),
    }
