"""The kernel microbenchmarks: every op in every form, checked first, then timed, with a CSV row for each result.

    python -m benchmarks.run                       # everything that runs on this machine
    python -m benchmarks.run --quick               # under two minutes on two cores
    python -m benchmarks.run --op scatter_mean --size vg16 1e5 --dtype bf16 --mode fwd_bwd

Without a GPU the rows are CPU rows of the reference and the baselines, and a roofline prediction is printed beside
them, labelled as one. Triton's interpreter is never timed; `--verify-only` checks our kernels through it.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.output import command_parser
from benchmarks.ops import cases
from sgg_fast.commands import command
from sgg_fast.config import ConfigError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("run", __doc__, "bench.csv and its plots, of --verify-only verify.csv")
    add = parser.add_argument
    add("--op", nargs="+", choices=cases.OPS, default=list(cases.OPS))
    add("--size", nargs="+", choices=list(cases.SIZES | cases.IMAGE_SIZES), help="default: by device and --quick")
    add("--dtype", nargs="+", choices=cases.DTYPES, help="default: fp32 on CPU, bf16 fp32")
    add("--mode", nargs="+", choices=cases.MODES, help="default: all, but no bwd with --quick")
    add("--backend", nargs="+", choices=cases.BACKENDS, default=cases.BACKENDS)
    add("--width", type=int, default=cases.WIDTH, help="D, columns (default %(default)s)")
    add("--no-plots", action="store_true", help="the CSV alone")
    add("--quick", action="store_true", help="fewer sizes and shorter timings")
    add("--verify-only", action="store_true", help="compare every form with the truth, time none")
    add("--compile-seconds", type=float, help="time for torch.compile's compilations in all")
    return parser.parse_args(argv)


@command("benchmarks.run", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if one of our forms failed or did not match."""
    args = parse(argv)
    from benchmarks.ops.timing import run

    return run(args)
