"""What the project wants to reach, what a model predicts of it and what was measured: `python -m benchmarks.targets`.

One row for each target and chip. A prediction is computed from committed counts (`baselines/steps.json`,
`baselines/launches.json`) by `counts/model.py` and `step_seconds` below; a memory plan comes from the planner. A
measurement names its kind: GPU (rows of a suite), CPU, stand-in (torch's own allocator on the stand-in for CUDA) or
count. Where nothing was measured on the chip, the verdict is the model's, and a target that the model misses shows its
largest term. Targets of single kernels: `ops/targets.py`.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser


@command("benchmarks.targets", refused=(OSError, json.JSONDecodeError))
def main(argv: list[str] | None) -> None:
    """Print the table."""
    parser = OneLineParser(prog="python -m benchmarks.targets", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="*", type=pathlib.Path, metavar="CSV",
                        help="rows of a GPU suite, beside benchmarks/results")  # fmt: skip
    args: argparse.Namespace = parser.parse_args(argv)
    if absent := [path for path in args.rows if not path.is_file()]:
        parser.error(f"{absent[0]}: there is no such file")
    from benchmarks.counts.targets import HERE, table
    from benchmarks.harness.output import read_rows
    from benchmarks.harness.readme_table import markdown

    rows = [row for path in [*sorted((HERE / "results").glob("*.csv")), *args.rows] for row in read_rows(path)]
    header = ["what", "chip", "target", "predicted", "measured", "verdict"]
    print("\n".join(markdown(header, table(rows))))
