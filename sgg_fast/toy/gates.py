"""Denoising error of a UNet by noise level, to watch a long training before its pictures are useful.

    python -m sgg_fast.toy.gates --model toy --data toy           # the model that ships
    python -m sgg_fast.toy.gates --model RUN --data toy-words

`noise_levels.py` defines the error.
"""

from __future__ import annotations

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser


@command("toy.gates")
def main(argv: list[str] | None) -> None:
    """Exit code 0, 2 for a model or settings that cannot be used, 3 for numbers that are not finite."""
    parser = OneLineParser(prog="python -m sgg_fast.toy.gates", description=__doc__)
    parser.add_argument("--model", help="a run, a pipeline folder or toy, as infer.py takes it")
    parser.add_argument("--data", default="toy", choices=("toy", "toy-words"), help="held-out scenes (%(default)s)")
    parser.add_argument("--num", type=int, default=128, help="scenes (%(default)s)")
    args = parser.parse_args(argv)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, not {args.num}")
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    from sgg_fast.toy.noise_levels import measure

    print(f"x0 error: {measure(args.model, args.data, args.num)}")
