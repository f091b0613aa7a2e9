"""Compiles every shipped kernel configuration for five GPUs, without a GPU, and checks the result.

    python -m benchmarks.aot                       # every chip: the table, and broken rules
    python -m benchmarks.aot --arch sm_89 --check  # also against the committed baseline
    python -m benchmarks.aot --update              # write the baselines
    python -m benchmarks.aot --case adam --update  # only the rows of the cases whose name contains "adam"

Rules (`rules.py`, `ir.py`): no stack, local memory, atomics or double precision; shared memory within the opt-in limit;
64-bit addressing; accesses contiguous within a warp, 16 bytes a lane if rows are aligned; the declared occupancy. The
baseline holds registers and shared memory; registers may differ by 10 %. It does not check results (the tests do) and
measures no time. Exit code 1 if a rule is broken or could not be checked.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import time

from benchmarks.aot.rules import CHIPS, AotError, in_fresh_process
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

TOLERANCE = 0.10
"""Relative tolerance of registers against the baseline."""

PROCESSES = 2
BASELINES = pathlib.Path(__file__).resolve().parents[1] / "baselines"


def compile_in_process(arch: str, pattern: str = "") -> list:
    """Compile the cases whose name contains `pattern` for `arch` in a process of its own. Raises `AotError`."""
    from benchmarks.aot.compile import compile_chip

    return in_fresh_process(compile_chip, arch, pattern)


def baseline_path(arch: str) -> pathlib.Path:
    """File of a chip's committed baseline."""
    return BASELINES / f"aot_{arch}.json"


def write_baseline(arch: str, compiled: list, path: pathlib.Path, pattern: str = "") -> None:
    """Registers and shared bytes of every kernel, one a line.

    pattern: rows of other cases stay as they are, and those of `compiled` follow them.
    """
    import triton

    kept = json.loads(path.read_text())["kernels"] if pattern and path.is_file() else {}
    found = {c.key: {"registers": c.registers, "shared": c.shared} for c in compiled}
    found = {key: row for key, row in kept.items() if pattern not in key} | found
    rows = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in found.items()]
    head = f' "arch": "{arch}",\n "triton": "{triton.__version__}",\n "kernels": {{\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + head + ",\n".join(rows) + "\n }\n}\n")


def baseline_diff(arch: str, compiled: list, path: pathlib.Path, pattern: str = "") -> list[str]:
    """One line for each kernel that differs from the baseline by more than the tolerance; rows of `pattern` alone."""
    import triton

    if not path.is_file():
        return [f"{arch}: no baseline at {path}: python -m benchmarks.aot --update"]
    stored = json.loads(path.read_text())
    made_by, old, lines = stored["triton"], stored["kernels"], []
    for c in compiled:
        was = old.get(c.key)
        if was is None:
            lines.append(f"{arch} {c.key}: not in the baseline (--update)")
            continue
        if abs(c.registers - was["registers"]) > TOLERANCE * was["registers"]:
            change = 100 * (c.registers / max(was["registers"], 1) - 1)
            lines.append(f"{arch} {c.key}: registers {was['registers']} -> {c.registers} ({change:+.0f} %)")
        if c.shared != was["shared"]:
            lines.append(f"{arch} {c.key}: shared {was['shared']} -> {c.shared} bytes")
    keys = {c.key for c in compiled}
    lines += [
        f"{arch} {key}: in the baseline, but no longer launched (--update)"
        for key in old
        if key not in keys and pattern in key
    ]
    if lines and made_by != triton.__version__:
        lines.append(f"{arch}: the baseline was made with triton {made_by}, this is {triton.__version__}")
    return lines


def violations(compiled: list, shipped: set[str]) -> list[str]:
    """One line for each broken rule: chip, case, kernel, reason."""
    lines = [f"{c.arch} {c.key}: {problem}" for c in compiled for problem in c.problems]
    missing = shipped - {c.kernel.split()[0] for c in compiled}
    arch = compiled[0].arch if compiled else "?"
    return lines + [
        f"{arch} {name}: a kernel that no case launches (benchmarks/aot/cases.py)" for name in sorted(missing)
    ]


def table(compiled: list) -> str:
    """Table of the kernels compiled for one chip."""
    wide = max(len(c.case) for c in compiled), max(len(c.kernel) for c in compiled)
    lines = [f"{'case':{wide[0]}}  {'kernel':{wide[1]}}  regs  shared  warps  resident  B/lane"]
    lines += [
        f"{c.case:{wide[0]}}  {c.kernel:{wide[1]}}  {c.registers:4}  {c.shared:6}  {c.num_warps:5}  {c.resident:8}"
        f"  {c.lane_bytes:6}{'  !' * bool(c.problems)}"
        for c in compiled
    ]
    return "\n".join(lines)


def report(arch: str, compiled: list, args: argparse.Namespace, shipped: set[str]) -> list[str]:
    """Print the report of one chip; returns one line for each fault."""
    wrong = violations(compiled, shipped)
    if args.update:
        write_baseline(arch, compiled, baseline_path(arch), args.case)
    if args.check:
        wrong += baseline_diff(arch, compiled, baseline_path(arch), args.case)
    else:
        print(table(compiled))
    cases = len({c.case for c in compiled})
    print(f"{arch}: {cases} cases, {len(compiled)} launches, {len({c.kernel.split()[0] for c in compiled})} kernels, "
          f"{len(wrong)} wrong", flush=True)  # fmt: skip
    return wrong


@command("aot", refused=(AotError, OSError))
def main(argv: list[str] | None) -> int:
    """The command line; returns the exit code."""
    parser = OneLineParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="chips (all)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds this (all)")
    parser.add_argument("--check", action="store_true", help="compare with the committed baselines; no table")
    parser.add_argument("--update", action="store_true", help="write the baselines")
    args = parser.parse_args(argv)
    from benchmarks.aot.cases import shipped_kernels

    started, shipped, wrong = time.perf_counter(), set() if args.case else shipped_kernels(), []
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        running = {arch: pool.submit(compile_in_process, arch, args.case) for arch in args.arch}
        for arch, future in running.items():
            try:
                wrong += report(arch, future.result(), args, shipped)
            except AotError as error:
                wrong.append(f"not checked: {error}")
    for line in wrong:
        print(f"  {line}")
    print(f"{'FAILED' if wrong else 'ok'} in {time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0
