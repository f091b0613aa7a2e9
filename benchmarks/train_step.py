"""A whole training step: time, memory and images a second, in every available form.

    python -m benchmarks.train_step --stage finetune                          # SD v1.4's sizes, needs a GPU
    python -m benchmarks.train_step --stage finetune --memory-cap 24GiB       # a larger card in place of a 4090
    python -m benchmarks.train_step --stage finetune --quick                  # the toy's sizes, as a check only
    python -m benchmarks.train_step --stage pretrain                          # on a CPU the toy's sizes

Weights and images are random. Each form's losses are first compared; a mismatch prints no number. The measurements are
in `steps/finetune.py` and `steps/pretrain.py`.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.output import command_parser
from benchmarks.steps import forms
from sgg_fast.commands import command
from sgg_fast.config import ConfigError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `ConfigError` for a form of the other stage."""
    parser = command_parser("train_step", __doc__, "train_step.csv or pretrain_step.csv")
    add = parser.add_argument
    add("--stage", required=True, choices=("pretrain", "finetune"))
    add(
        "--form",
        nargs="+",
        choices=[*forms.FINETUNE, *forms.PRETRAIN],
        help="default: all; of --quick those that do not compile",
    )
    add("--resolution", nargs="+", type=int, help="default: 128 256 512")
    add("--batch", nargs="+", type=int, help="default: 2 16; of pre-training 2 64")
    add("--memory-cap", help="let torch have no more of the card than this, such as 24GiB")
    add("--quick", action="store_true", help="the toy's sizes, on any device: that everything works")
    args = parser.parse_args(argv)
    known = forms.FINETUNE if args.stage == "finetune" else forms.PRETRAIN
    if unknown := [name for name in args.form or () if name not in known]:
        raise ConfigError(f"--form {unknown[0]} is not of --stage {args.stage}")
    return args


@command("train_step", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if a form did not match or failed for another reason than memory, 2 for a wrong command line."""
    args = parse(argv)
    from benchmarks.steps import finetune, pretrain

    return (finetune if args.stage == "finetune" else pretrain).run(args)
