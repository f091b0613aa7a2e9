"""Times one optimiser step, gradients given: our flat kernels against torch's Adam, bitsandbytes' and torchao's.

    python -m benchmarks.optimiser                      # everything that runs here
    python -m benchmarks.optimiser --size unet --backend ours fused bitsandbytes-flat --out outputs/bench

`unet` are the 686 weights of Stable Diffusion v1's UNet, `graph` a graph encoder's. Before a form is timed, three of
its steps on the small set are compared with Adam in float64; a wrong form gets no number. Rows have the format of
`benchmarks.run`; CPU rows do not predict a GPU. Our kernels are timed only on CUDA.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.output import command_parser
from benchmarks.ops.cases import OPTIMISER_SIZES, OPTIMISERS
from sgg_fast.commands import command
from sgg_fast.config import ConfigError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("optimiser", __doc__, "bench.csv, to which the rows are appended")
    parser.add_argument("--size", nargs="+", choices=OPTIMISER_SIZES, help="default: unet, on a CPU graph")
    parser.add_argument("--backend", nargs="+", choices=OPTIMISERS, default=OPTIMISERS)
    parser.add_argument("--seconds", type=float, default=0.3, help="per timing (default %(default)s)")
    return parser.parse_args(argv)


@command("optimiser", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if one of our forms is wrong."""
    args = parse(argv)
    from benchmarks.ops.optimisers import run

    return run(args)
