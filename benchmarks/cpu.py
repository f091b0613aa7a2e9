"""Processor time of the toy's fine-tuning step and pictures on a CPU, ours against diffusers', by everyone's defaults.

    python -m benchmarks.cpu
    python -m benchmarks.cpu --what draw --rounds 20

In each round every form runs once, one after the other, so that a busy machine slows all alike; what counts is the
processor's time, of all threads. Outputs are compared first; a mismatch prints no number. The forms are in
`steps/cpu.py`.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.output import command_parser
from sgg_fast.commands import command
from sgg_fast.config import ConfigError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("cpu", __doc__, "toy_cpu.csv")
    parser.add_argument("--what", nargs="+", choices=("finetune", "draw"), default=["finetune", "draw"])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    return args


@command("cpu", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if a form did not match."""
    args = parse(argv)
    from benchmarks.steps.cpu import run

    return run(args)
