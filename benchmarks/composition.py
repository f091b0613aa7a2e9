"""What makes unseen combinations fail: the text, the graph's share of the tokens, or the UNet.

    python -m benchmarks.composition --model RUN --num 120

The graphs of `toy-words-combinations` are drawn from one noise in several ways. In a neighbour of a graph one object of
each unseen combination is exchanged for one that training scenes showed in its place (a dog that rides a boat for a
person). The rows:

* asked: the graph as it is;
* neighbour: the neighbour, judged by its own relations: what the UNet reaches where the combination was seen;
* neighbour's tokens: the graph, but the tokens of its unseen relations are the neighbour's;
* neighbour's text, neighbour's graph: only this summand of those tokens is the neighbour's;
* neighbour's text everywhere, neighbour's graph everywhere: the same of all tokens;
* from its scene at t = 800, at t = 600: the graph, but drawing begins from the real scene, noised to that timestep.

If a row with exchanged tokens is as good as the neighbour, the UNet can draw the combination and the tokens fail. If
the rows from the scene are, the UNet can draw it and fails to place it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="python -m benchmarks.composition", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a run or pipeline of SGG-IG on toy-words")
    parser.add_argument("--num", type=int, default=120, help="graphs (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="steps of DPM-Solver++ (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of a sheet of the first graphs")
    args = parser.parse_args(argv)
    if args.num < 1 or args.steps < 2:
        parser.error("--num must be at least 1, --steps at least 2")
    return args


@command("composition")
def main(argv: list[str] | None) -> int:
    """Print a line for each row: share of unseen relations that hold if both objects are there, by predicate."""
    args = parse(argv)
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    from benchmarks.quality.composition import run

    print(run(args))
    return 0
