"""Runs the programs of `benchmarks.aot`: every program of every chip, forward and backward, against the reference.

    python -m benchmarks.aot.run                        # five chips
    python -m benchmarks.aot.run --arch sm_89 --counts  # one chip, with the counters of its kernels
    python -m benchmarks.aot.run --arch sm_89 --case geglu --verbose
    python -m benchmarks.aot.run --write                # the counters' table in kernels/README.md, of a case a kernel

The machine (`benchmarks.aot.ptx`) executes the PTX at small sizes and checks bounds, alignment, unwritten memory and
races. Programs that two chips share run once. A basic block that no run enters is printed with its reason. A block
without a reason is a fault, and so are more than 3 % of unentered blocks. It measures no time and does not check the
output of `ptxas`. Exit code 1 if anything is wrong or did not run.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import time
from collections.abc import Callable

from benchmarks.aot.rules import CHIPS, AotError, in_fresh_process
from benchmarks.harness.readme_table import ReadmeTable, markdown
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels" / "sgg_kernels"
MOST_UNENTERED = 0.03
"""Share of the basic blocks of all programs."""

COUNTED_ARCH = "sm_89"
COUNTED = (
    "pack padded masked",
    "hash_draw normal",
    "adam paper",
    "adam8bit 8 unet split",
    "adafactor wide lean",
    *(f"{op} {size}" for op in ("gather_add_relu", "scatter_mean", "masked_pool", "triple_context")
      for size in ("bucket bf16", "scale autocast")),
    "group_norm_silu C/G 10 1024 bfloat16",
    "group_norm_silu 512px bfloat16",
    "add_layer_norm 320 bfloat16",
    "geglu 320 bfloat16",
    "cross_attention 40 bfloat16",
)  # fmt: skip
"""Cases of the table in kernels/README.md: the paper's bucket or level, and one that reaches the split kernels."""

_LOOP = "skips a loop that has at least one turn: "
REASONS: dict[tuple[str, str], str] = {
    ("adafactor_", "range("): _LOOP + "a matrix has a row and a column",
    ("adafactor_", "tl.store("): _LOOP + "a matrix has a row and a column",
    ("pack_fwd_kernel", "//"): "64-bit division of numbers from 2^32 on; a batch has at most 2^28 rows",
    ("cross_attention_bwd_kv_kernel", "for start in range("): _LOOP + "a chunk has a query",
    ("cross_attention_bwd_kv_kernel", "tl.store("): _LOOP + "a chunk has a query",
    ("cross_attention_fwd_kernel", "tl.log2(b_sum)"): "log2 of Inf or NaN; a sum of weights lies between 1 and 128",
    ("role_sums_kernel", "for i_row in range("): _LOOP + "a program has a row",
    ("role_sums_kernel", "b_program"): _LOOP + "a program has a row",
    ("scatter_mean_bwd_kernel", "for start in range("): _LOOP + "a program has a relation",
    ("scatter_mean_bwd_kernel", "p_partial"): _LOOP + "a program has a relation",
    ("scatter_mean_fwd_hub_kernel", "for start in range("): _LOOP + "a chunk has rows",
    ("scatter_mean_fwd_hub_kernel", "tl.store(partial_ptr"): _LOOP + "a chunk has rows",
    ("scatter_mean_fwd_hub_kernel", "o_D < D"): _LOOP + "a chunk has rows",
    ("group_norm_silu_", "range("): _LOOP + "an image has a pixel, a group a chunk",
    ("group_norm_silu_", "tl.sum(b_PC)"): _LOOP + "a group has a chunk",
    ("group_norm_silu_fwd_kernel", "weight_C = "): _LOOP + "an image has a pixel",
    ("group_norm_silu_", "o_out = "): _LOOP + "an image has a pixel, a group a chunk",
}
"""(start of a kernel's name, text in the Python line of a block) -> the reason why no run enters that block."""


COLUMNS = (
    "kernel", "instructions", "float", "special", "integer", "move", "global", "shared", "warp", "sectors a load",
    "useful", "sectors a store", "useful", "passes more", "barriers",
)  # fmt: skip


@dataclasses.dataclass
class Result:
    """Findings of one chip's process."""

    arch: str
    programs: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Digest -> the launches of the AOT cases that compile to it."""
    ran: list[str] = dataclasses.field(default_factory=list)
    """Digests of programs that ran here in a case with correct results."""
    cases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Case -> its fault, "" for none, "shared" if another chip's run covers it."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    entered: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Digest -> the number of warps that entered each of its blocks."""
    sources: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Digest -> the source line of each block."""
    counts: list[str] = dataclasses.field(default_factory=list)
    cells: list[list[str]] = dataclasses.field(default_factory=list)
    """The counts as rows of the table in kernels/README.md."""


def compile_programs(result: Result, chosen: Callable[[str], bool]) -> dict[str, set[str]]:
    """Digests of each chosen AOT case; every launch is compiled, none is run."""
    from sgg_kernels.launch import intercept

    from benchmarks.aot.cases import cases
    from benchmarks.aot.ptx.program import digest

    made: dict[str, set[str]] = collections.defaultdict(set)
    for case in cases():

        def take(kernel, grid, args, options, name=case.name) -> bool:
            compiled = kernel.warmup(*args, grid=grid, **options)
            program = digest(compiled.asm["ptx"], compiled.metadata.shared)
            made[name].add(program)
            result.programs.setdefault(program, []).append(f"{name}: {kernel.__name__}")
            return True

        if chosen(case.name):
            with intercept(take):
                case.run()
    return made


def work(arch: str, known: set[str], pattern: str, counts: bool, exact: tuple[str, ...] = ()) -> Result:
    """Run one chip in this process: cases whose name contains `pattern`, or those of `exact`.

    known: digests of programs already found correct.
    """
    import torch

    from benchmarks.aot.ptx.cases import small_cases
    from benchmarks.aot.ptx.counts import Row, header
    from benchmarks.aot.ptx.host import Host

    def chosen(name: str) -> bool:
        return name in exact if exact else pattern in name

    torch.set_num_threads(1)
    result, host, done = Result(arch), Host(arch, count=counts), {}
    with host.taking_over():
        programs = compile_programs(result, chosen)
        for name, run in small_cases().items():
            if not chosen(name):
                continue
            if programs[name] <= known:
                result.cases[name] = "shared"
                continue
            key = (run.func, run.args)
            if key not in done:
                began = time.perf_counter()
                host.launched.clear()
                done[key] = _outcome(run), sorted(host.launched), time.perf_counter() - began
                host.fresh.forget()
            result.cases[name], ran, result.seconds[name] = done[key]
            result.ran += ran if not result.cases[name] else []
    for program, kernel in host.kernels.items():
        result.entered[program] = kernel.executed.tolist()
        result.sources[program] = kernel.program.sources()
    if counts:
        rows = {name: Row(name) for name in sorted(set(host.names.values()))}
        for program, kernel in host.kernels.items():
            kernel.add_to(rows[host.names[program]])
        result.counts = [header(), *(row.line() for row in rows.values())]
        result.cells = [row.cells() for row in rows.values()]
    return result


def _outcome(run) -> str:
    from benchmarks.aot.ptx.program import PtxError

    try:
        run()
    except (AssertionError, PtxError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def unentered(results: list[Result]) -> tuple[int, collections.Counter]:
    """(number of blocks, (kernel, source line) -> blocks that no chip's run entered)"""
    total, missed = 0, collections.Counter()
    seen: dict[str, list[bool]] = {}
    for result in results:
        for program, warps in result.entered.items():
            flags = [n > 0 for n in warps]
            seen[program] = [a or b for a, b in zip(seen.get(program, flags), flags, strict=True)]
    names = {p: used[0].split(": ")[1] for r in results for p, used in r.programs.items()}
    lines = {p: sources for r in results for p, sources in r.sources.items()}
    for program, flags in seen.items():
        if program in names:  # small sizes may need programs that do not ship
            total += len(flags)
            missed.update((names[program], lines[program][k]) for k, entered in enumerate(flags) if not entered)
    return total, missed


def python_line(source: str) -> str:
    """The innermost line in a kernel's file that `file.py:line:column @[ file.py:line:column ]` names; "" for none."""
    for name, number in re.findall(r"(\w+\.py):(\d+)", source):
        found = next(KERNELS.rglob(name), None)
        if int(number) and found:
            return found.read_text().splitlines()[int(number) - 1].strip()
    return ""


def report(results: list[Result], whole: bool) -> list[str]:
    """Print the tables; returns one line for each fault."""
    wrong, ran = [], {program for result in results for program in result.ran}
    print(f"{'chip':8} {'cases':>6} {'equal':>6} {'shared':>7} {'programs':>9} {'run':>5} {'seconds':>8}")
    for r in results:
        bad = {name: why for name, why in r.cases.items() if why not in ("", "shared")}
        shared = sum(why == "shared" for why in r.cases.values())
        print(f"{r.arch:8} {len(r.cases):6} {len(r.cases) - len(bad) - shared:6} {shared:7} {len(r.programs):9} "
              f"{len(ran & r.programs.keys()):5} {sum(r.seconds.values()):8.0f}")  # fmt: skip
        wrong += [f"{r.arch} {name}: {why}" for name, why in bad.items()]
        if whole:
            wrong += [f"{r.arch} {used[0]}: no run" for p, used in r.programs.items() if p not in ran]
    total, missed = unentered(results)
    print(f"blocks: {total}, never entered {sum(missed.values())} ({100 * sum(missed.values()) / max(total, 1):.1f} %)")
    for (kernel, line), num in sorted(missed.items()):
        code = python_line(line)
        why = next((why for (name, text), why in REASONS.items() if kernel.startswith(name) and text in code), "")
        print(f"  {num:3} {kernel} {line.split(' @')[0]} `{code}`: {why or 'NO REASON KNOWN'}")
        wrong += [f"{kernel} {line}: a block that no run enters, without a reason"] if whole and not why else []
    if whole and sum(missed.values()) > MOST_UNENTERED * total:
        wrong.append(f"more than {100 * MOST_UNENTERED:.0f} % of the blocks are never entered")
    for r in results:
        print(*r.counts, sep="\n")
    return wrong


def body() -> str:
    """The table of kernels/README.md: instructions and memory accesses of the compiled kernels."""
    result = in_fresh_process(work, COUNTED_ARCH, set(), "", True, COUNTED)
    wrong = [f"{name}: {why}" for name, why in result.cases.items() if why]
    if wrong:
        raise AotError("; ".join(wrong))
    return "\n".join(markdown(COLUMNS, result.cells))


TABLE = ReadmeTable("aot.run", "instructions", body)


@command("aot.run", refused=(AotError, OSError))
def main(argv: list[str] | None) -> int:
    """The command line; returns the exit code."""
    parser = OneLineParser(prog="python -m benchmarks.aot.run", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="chips (all)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds this (all)")
    parser.add_argument("--counts", action="store_true", help="instructions, sectors, bank conflicts and barriers")
    parser.add_argument("--write", action="store_true", help="only put the counters' table into kernels/README.md")
    parser.add_argument("--check", action="store_true", help="only compare that table with kernels/README.md")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    args = parser.parse_args(argv)
    if args.write or args.check:
        return TABLE.put(write=args.write)
    began, results, known = time.perf_counter(), [], set()
    for arch in args.arch:
        results.append(in_fresh_process(work, arch, known, args.case, args.counts))
        known |= set(results[-1].ran)
        if args.verbose:
            for name, why in results[-1].cases.items():
                print(f"{arch} {name:44} {results[-1].seconds.get(name, 0.0):6.1f} s  {why or 'equal'}", flush=True)
    wrong = report(results, whole=not args.case)
    for line in wrong:
        print(f"  {line}")
    print(f"{'FAILED' if wrong else 'ok'} in {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0
