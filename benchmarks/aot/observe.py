"""Counts the launches of every op at the sizes of kernels/README.md, for the model of `benchmarks.counts.model`.

    python -m benchmarks.aot.observe            # compare with baselines/launches.json
    python -m benchmarks.aot.observe --write    # replace it
    python -m benchmarks.aot.observe --op geglu --write

The PTX machine runs the op on its real shapes, but only some programs of a large grid, spread evenly: a count needs no
result, and nothing is compared (`benchmarks.aot.run` does that). Compiled for sm_89.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from benchmarks.aot.rules import AotError, in_fresh_process
from benchmarks.ops.cases import FORWARD_ONLY, OPS
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

ARCH = "sm_89"
PROGRAMS = 64
"""Programs that run of a larger grid."""
SIZES = ("paper", "512px", "1e4", "1e5")
TOLERANCE = 0.1
"""Relative difference of a count that is accepted: versions of Triton differ by a few instructions, and the place of a
tensor decides how many sectors its rows touch."""

Passes = list[list[dict[str, Any]]]


def observe(ops: list[str]) -> dict[str, Passes]:
    """Run the ops in this process; the content of the file."""
    import torch

    from benchmarks.aot.observer import Observer
    from benchmarks.ops import registry
    from benchmarks.ops.baselines import form
    from benchmarks.ops.cases import GRAPH_OPS, IMAGE_SIZES, Case
    from benchmarks.ops.cases import SIZES as GRAPH_SIZES

    torch.set_num_threads(1)
    host, found = Observer(ARCH, PROGRAMS), {}
    with host.taking_over():
        for op in ops:
            run = form(op, "ours")
            assert run is not None
            dtype = FORWARD_ONLY.get(op, "bf16")
            for size in SIZES:
                if op == "layer" or size not in (GRAPH_SIZES if op in GRAPH_OPS else IMAGE_SIZES):
                    continue
                given = registry.inputs(Case(op, "fwd_bwd", size, dtype), "cpu")
                leaves = {name: t.detach().requires_grad_() for name, t in given.tensors.items()}
                outputs = run(given, leaves)
                passes = [host.taken()]
                if leaves:
                    torch.autograd.grad(outputs, list(leaves.values()), [torch.zeros_like(o) for o in outputs])
                    passes.append(host.taken())
                found[f"{op} {size} {dtype}"] = [[dataclasses.asdict(x) for x in launches] for launches in passes]
                host.fresh.forget()
    return found


def differences(found: dict[str, Passes], committed: dict[str, Passes]) -> list[str]:
    """One line for each case whose launches are not the committed ones."""
    from benchmarks.counts.model import Launch

    wrong = []
    for name, passes in found.items():
        old = committed.get(name)
        if old is None or [len(p) for p in old] != [len(p) for p in passes]:
            wrong.append(f"{name}: other launches")
            continue
        pairs = [pair for x, y in zip(passes, old, strict=True) for pair in zip(x, y, strict=True)]
        for new, was in ((Launch(**a), Launch(**b)) for a, b in pairs):
            same = (new.kernel, new.programs, new.warps) == (was.kernel, was.programs, was.warps)
            counts = (new.instructions, was.instructions), (new.loads, was.loads), (new.bytes, was.bytes)
            if not same or any(abs(a - b) > TOLERANCE * b for a, b in counts):
                wrong.append(f"{name}: {new}, not {was}")
    return wrong


@command("aot.observe", refused=(AotError, OSError))
def main(argv: list[str] | None) -> int:
    """The command line; returns the exit code."""
    parser = OneLineParser(prog="python -m benchmarks.aot.observe", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=[op for op in OPS if op != "layer"], help="only these (all)")
    parser.add_argument("--write", action="store_true", help="replace their lines in benchmarks/baselines")
    args = parser.parse_args(argv)
    from benchmarks.counts.model import DATA

    found = in_fresh_process(observe, args.op or [op for op in OPS if op != "layer"])
    committed = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
    wrong = differences(found, committed)
    print(*wrong, f"{len(found)} cases, {len(wrong)} differences", sep="\n")
    if args.write:
        kept = committed if args.op else {}
        DATA.write_text(json.dumps(dict(sorted((kept | found).items())), indent=1) + "\n", encoding="utf-8")
        return 0
    return 1 if wrong else 0
