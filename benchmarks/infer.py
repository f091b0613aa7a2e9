"""Seconds a picture: our pipeline, called, fused and captured, against diffusers' own, called and compiled.

    python -m benchmarks.infer                      # SD v1.4's sizes with random weights, needs a GPU
    python -m benchmarks.infer --model RUN          # the same for a pipeline
    python -m benchmarks.infer --quick              # the shipped toy model in under a minute, as a check only
    python -m benchmarks.infer --form captured diffusers --resolution 256 --batch 1

Latents after a few steps are first compared with those of diffusers' pipeline in fp32; a mismatch prints no number. The
last rows are the first picture of a fresh process. The measurement is in `steps/sampling.py`.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.output import command_parser
from benchmarks.ops.cases import DTYPES
from benchmarks.steps import forms
from sgg_fast.commands import command
from sgg_fast.config import ConfigError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line with the defaults that do not depend on the device filled in."""
    parser = command_parser("infer", __doc__, "infer.csv")
    add = parser.add_argument
    add("--form", nargs="+", choices=forms.SAMPLING, help="default: all; of --quick those that do not compile")
    add("--model", help="run, pipeline folder, hub id or toy; default: random weights of SD v1.4's sizes")
    add("--resolution", nargs="+", type=int, help="default: 256 512")
    add("--batch", nargs="+", type=int, help="default: 1 8")
    add("--steps", type=int, help="DDIM steps (100)")
    add("--dtype", choices=DTYPES, help="of the UNet (fp16; fp32 on a CPU)")
    add("--quick", action="store_true", help="the toy model, few steps, on any device: that everything works")
    add("--no-cold", action="store_true", help="leave out the first picture of a fresh process")
    add("--first-picture", action="store_true", help=argparse.SUPPRESS)
    add("--since", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.model = args.model or ("toy" if args.quick else None)
    args.form = args.form or [name for name in forms.SAMPLING if not args.quick or name in forms.QUICK_SAMPLING]
    args.resolution = args.resolution or ([64] if args.quick else [256, 512])
    args.batch = args.batch or ([1, 2] if args.quick else [1, 8])
    args.steps = args.steps or (4 if args.quick else 100)
    return args


@command("infer", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if a form did not match, 2 for a wrong command line."""
    args = parse(argv)
    from benchmarks.steps.sampling import run

    return run(args)
