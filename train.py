"""Train SGG-IG: `python train.py --stage pretrain`, then `python train.py --stage finetune --deepspeed ds.json`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

# Before torch loads OpenMP: on a busy machine spinning threads made the toy's steps 20 times slower than sleeping ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
    stage, name, ds_path, out = (args.pop(key) for key in ("stage", "recipe", "deepspeed", "out"))
    graph_encoder, overwrite = args.pop("graph_encoder"), args.pop("overwrite")
    args.pop("local_rank")
    if "steps" in args:
        args[f"{stage}_steps"] = args.pop("steps")
    out = out or Path("runs") / name
    from sgg_fast import env
    from sgg_fast.quiet import quiet_libraries
    from sgg_fast.recipes import recipe

    try:
        try:
            config = recipe(name, **args)  # refused before the libraries are loaded, which takes seconds
            quiet_libraries(verbose=env.rank() == 0)
            from sgg_fast.train.trainer import Trainer

            trainer = Trainer(config, stage, out, ds_path, graph_encoder, overwrite)
        except (ValueError, OSError) as error:
            return refuse(error)
        try:
            result = trainer.train()
        except OSError as error:  # a full disk; any other error from here on is a bug and keeps its traceback
            return refuse(error)
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    if env.rank() == 0:
        print(f"saved {result}\nnext: {next_command(stage, name, out, args)}")
    return 0


def refuse(error: Exception) -> int:
    """One line on stderr; exit code 2."""
    print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def next_command(stage: str, recipe: str, out: Path, settings: dict[str, object]) -> str:
    """What to type after this stage, with the settings that were given."""
    if stage == "finetune":
        return shlex.join(["python", "infer.py", "graph.json", "--model", str(out)])
    words = [
        "python",
        "train.py",
        "--stage",
        "finetune",
        "--deepspeed",
        "ds.json",
        "--recipe",
        recipe,
        "--out",
        str(out),
    ]
    given = {name: value for name, value in settings.items() if name != "pretrain_steps"}
    return shlex.join(
        [*words, *(w for name, value in given.items() for w in (f"--{name.replace('_', '-')}", str(value)))]
    )


if __name__ == "__main__":
    sys.exit(main())
