"""Pre-trains the toy with the operands of its GEMMs rounded as a GPU would round them, beside fp32, on any machine.

    python -m benchmarks.gemm_precision                       # fp32, TF32 and bf16 operands, 300 steps, two seeds
    python -m benchmarks.gemm_precision --steps 600 --seeds 0 1 2

It answers what `--pretrain-matmul high` does to the loss curve. A tensor core multiplies rounded operands exactly and
sums in fp32, so rounding the operands of every GEMM, forward and backward, in fp32 arithmetic stands for it. Nothing is
timed. Samples, masks and noise of a seed are the same in every column.
"""

from __future__ import annotations

import argparse
import math

from benchmarks.steps.forms import MANTISSA
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser


@command("benchmarks.gemm_precision")
def main(argv: list[str] | None) -> None:
    """Print each curve and its distance from fp32's."""
    parser = OneLineParser(prog="python -m benchmarks.gemm_precision", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="pre-training steps (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1), help="default 0 1")
    parser.add_argument("--precision", nargs="+", choices=MANTISSA, default=tuple(MANTISSA))
    args: argparse.Namespace = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    from benchmarks.steps.gemm_precision import curve, shares

    for seed in args.seeds:
        exact: list[float] = []
        for precision in args.precision:
            losses, scores = curve(precision, seed, args.steps)
            exact = exact or losses
            away = math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, exact, strict=True)) / len(losses))
            points = " ".join(f"{point:.4f}" for point in shares(losses))
            overall = sum(scores.values()) / len(scores)
            rest = f"rms from {args.precision[0]} {away:.5f}; held-out accuracy {overall:.4f}"
            print(f"seed {seed} {precision}: {points}; {rest}", flush=True)
