"""Compiles a recipe's kernels before its first step: `python -m sgg_fast.train.warmup --recipe vg256`.

It takes the settings of train.py. On random weights and graphs it takes real steps of both stages and draws a picture,
so it needs what they need, memory included. Triton keeps the compiled kernels in its cache on disk, where the real run
finds them. Triton compiles different kernels for a size that is a multiple of 16 and for one that is not, so batches
without a fixed shape (`--no-cuda-graphs`) may compile a few more kernels later.
"""

from __future__ import annotations

import argparse

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import add_flags
from sgg_fast.recipes import RECIPES, recipe


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings of a recipe, as train.py takes them."""
    parser = OneLineParser(prog="python -m sgg_fast.train.warmup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="toy", help=f"named settings: {', '.join(RECIPES)} (toy)")
    parser.add_argument("--deepspeed", metavar="DS_JSON", help="DeepSpeed configuration of the fine-tuning")
    add_flags(parser.add_argument_group("settings of the recipe"))
    return parser.parse_args(argv)


@command("warmup", interrupted="what was compiled is kept")
def main(argv: list[str] | None) -> None:
    """Exit code: 0 done; 2 for settings or a machine that cannot do it (one line on stderr), 130 interrupted."""
    args = vars(parse(argv))
    name, ds_path = args.pop("recipe"), args.pop("deepspeed")
    config = recipe(name, **args)
    import torch

    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here: kernels are compiled on the machine that runs them")
    from sgg_fast import env
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    from sgg_fast.train.rehearsal import warm_up

    try:
        warm_up(config, env.device(), ds_path, lambda line: print(line, flush=True))
    except torch.OutOfMemoryError as error:
        raise ValueError(str(error)) from error
