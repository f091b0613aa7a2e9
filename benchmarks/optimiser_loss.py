"""What an optimiser's state does to the loss: toy fine-tunings side by side, from one start, on the same samples.

    python -m benchmarks.optimiser_loss                       # four optimisers, three seeds, 300 steps
    python -m benchmarks.optimiser_loss --weights lean --seed 1 --optimizer adam8bit adam4bit adafactor

A row is a seed and an optimiser: the mean training loss of each third of the run, and the mean absolute difference from
the first optimiser's loss on the same step. All runs of a seed see the same images, noise and times, so differences
come from the optimiser. Rows are printed as the thirds end. On a CPU every state but torch's Adam is the reference's.
"""

from __future__ import annotations

import argparse

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import ConfigError
from sgg_fast.config.optim import BLOCKWISE

THIRDS = 3


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="python -m benchmarks.optimiser_loss", description=__doc__.split("\n")[0])
    every = ("adam", *BLOCKWISE)
    parser.add_argument("--optimizer", nargs="+", choices=every, default=every, help="the first is compared with")
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--weights", choices=("master", "split", "lean"), default="master")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    return args


@command("optimiser_loss", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Print the rows."""
    args = parse(argv)
    import numpy as np

    from benchmarks.steps.optimiser_loss import runs_of

    third = -(-args.steps // THIRDS)
    for seed in args.seed:
        part: list[dict[str, float]] = []
        for step, losses in enumerate(runs_of(seed, args), 1):
            part.append(losses)
            if len(part) == third or step == args.steps:
                first = np.array([row[args.optimizer[0]] for row in part])
                for name in args.optimizer:
                    mine = np.array([row[name] for row in part])
                    print(f"seed {seed}  steps {step - len(part) + 1}-{step}  {name:9}  loss {mine.mean():.4f}  "
                          f"difference {np.abs(mine - first).mean():.4f}  bias {(mine - first).mean():+.4f}",
                          flush=True)  # fmt: skip
                part = []
    return 0
