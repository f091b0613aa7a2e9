"""Train SGG-IG: `python train.py --stage pretrain`, then `python train.py --stage finetune --deepspeed ds.json`."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this script and, from the fields of `Config`, of the recipe."""
    from sgg_fast.config import add_flags
    from sgg_fast.recipes import RECIPES

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", required=True, choices=("pretrain", "finetune"))
    parser.add_argument("--recipe", default="toy", help=f"named settings: {', '.join(RECIPES)} (toy)")
    parser.add_argument("--deepspeed", metavar="DS_JSON", help="DeepSpeed configuration, for --stage finetune")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/RECIPE); its stages are folders in it")
    parser.add_argument("--graph-encoder", type=Path, help="pre-trained graph encoder (OUT/pretrain/graph_encoder)")
    parser.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="iterations of the chosen stage")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of continuing the run in OUT")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    add_flags(parser.add_argument_group("settings of the recipe"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 for settings or input that cannot run (one line on stderr)."""
    args = vars(parse(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from sgg_fast import env
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    stage, name, ds_path, out = (args.pop(key) for key in ("stage", "recipe", "deepspeed", "out"))
    graph_encoder, overwrite = args.pop("graph_encoder"), args.pop("overwrite")
    args.pop("local_rank")
    if "steps" in args:
        args[f"{stage}_steps"] = args.pop("steps")
    try:
        from sgg_fast.recipes import recipe
        from sgg_fast.train.trainer import Trainer

        config = recipe(name, **args)
        out = out or Path("runs") / name
        if overwrite and env.rank() == 0:
            shutil.rmtree(out / stage, ignore_errors=True)
        result = Trainer(config, stage, out, ds_path, graph_encoder).train()
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    if env.rank() == 0:
        print(f"saved {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
