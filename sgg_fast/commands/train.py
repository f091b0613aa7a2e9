"""Train SGG-IG: `python train.py --stage pretrain`, then `python train.py --stage finetune --deepspeed ds.json`.

On N GPUs: `torchrun --nproc_per_node N train.py ...`, with or without --deepspeed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgg_fast.commands import REFUSED, command, refuse, tell, typed
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.digests import VERIFY

if TYPE_CHECKING:
    from sgg_fast.train.run.interrupts import Stop

NAME = "train.py"
STAGES = ("pretrain", "finetune")


def command_line() -> argparse.ArgumentParser:
    """Flags of this script and, from the fields of `Config`, of the recipe."""
    from sgg_fast.config import add_flags
    from sgg_fast.recipes import RECIPES

    parser = OneLineParser(prog=NAME, description=__doc__)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--settings", metavar="FILE", type=Path, help="TOML file of flags by their names, such as the "
                        "settings.toml of a run; flags on the command line win")  # fmt: skip
    parser.add_argument("--recipe", default="toy", help=f"named settings: {', '.join(RECIPES)} (toy)")
    parser.add_argument("--deepspeed", metavar="DS_JSON", help="DeepSpeed configuration, for --stage finetune")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/RECIPE); its stages are folders in it")
    parser.add_argument("--graph-encoder", type=Path, help="pre-trained graph encoder (OUT/pretrain/graph_encoder)")
    parser.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="iterations of the chosen stage")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of continuing the run in OUT")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result with its card at the end")
    parser.add_argument("--verify", action="store_true", help="read every byte of models and data again")
    parser.add_argument("--plan", nargs="?", const="cuda", choices=("cuda", "cpu"), help="print what memory "
                        "fine-tuning will take on a GPU (or in CPU memory), part by part, and run nothing")  # fmt: skip
    parser.add_argument("--budget", help="memory that there is, for --plan (24GiB) and --auto-batch (the device's)")
    parser.add_argument("--auto-batch", action="store_true", help="fine-tune with the largest micro-batch that fits, "
                        "accumulated to the same images a step")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    add_flags(parser.add_argument_group("settings of the recipe"))
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line on top of the file of --settings. Exits with one line for a bad flag or file."""
    from sgg_fast.config import ConfigError, read_settings

    parser = command_line()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--settings", type=Path)
    try:
        path = first.parse_known_args(argv)[0].settings
    except argparse.ArgumentError:  # the whole command line is refused below
        path = None
    if path is not None:
        stage = next(action for action in parser._actions if action.dest == "stage")
        try:
            found = read_settings(path)
        except ConfigError as error:
            sys.exit(refuse(NAME, error))
        parser.set_defaults(**found)
        stage.required = "stage" not in found
    args = parser.parse_args(argv)
    if args.stage not in STAGES:  # argparse does not check defaults
        parser.error(f"--settings {path}: stage must be {' or '.join(STAGES)}, not {args.stage!r}")
    return args


@command(NAME, interrupted="the same command continues from the last checkpoint", refused=())
def main(argv: list[str] | None) -> int:
    """Exit code: 0 done; otherwise one line on stderr gives the reason.

    2: settings, input or disk that cannot be used; 3: numbers that are not finite; 4: another process of the run was
    lost; 129, 130 and 143: stopped by SIGHUP, SIGINT or SIGTERM.
    """
    from sgg_fast.train.run.interrupts import stops_at_once

    with stops_at_once(NAME):
        return _run(vars(parse(argv)))


def _run(args: dict[str, Any]) -> int:
    """Start the run of these flags; returns its exit code."""
    stage, name, ds_path, out = (args.pop(key) for key in ("stage", "recipe", "deepspeed", "out"))
    graph_encoder, overwrite, file = args.pop("graph_encoder"), args.pop("overwrite"), args.pop("settings")
    repo = args.pop("push_to_hub")
    graph_encoder = graph_encoder and Path(graph_encoder)
    if args.pop("verify"):
        os.environ[VERIFY] = "1"
    plan, budget, auto_batch, _ = (args.pop(key) for key in ("plan", "budget", "auto_batch", "local_rank"))
    if "steps" in args:
        args[f"{stage}_steps"] = args.pop("steps")
    out = out or Path("runs") / name
    from sgg_fast import env
    from sgg_fast.config import ConfigError
    from sgg_fast.quiet import quiet_libraries
    from sgg_fast.recipes import recipe
    from sgg_fast.train.preflight import preflight
    from sgg_fast.train.run.hub import check_hub, push
    from sgg_fast.train.run.interrupts import Stop

    try:
        try:
            config = recipe(name, **args)  # raises before the libraries are loaded, which takes seconds
            if budget and not (plan or auto_batch):
                raise ConfigError("--budget is for --plan and --auto-batch: add one of them")
            if not plan:
                preflight(config, stage, out, ds_path, graph_encoder)
                if repo and env.rank() == 0:
                    check_hub(repo, stage)
            quiet_libraries(verbose=env.rank() == 0)
            from sgg_fast.train.memory import advice as memory
            from sgg_fast.train.trainer import Trainer

            if plan:
                text = memory.show_plan(memory.TypedRun(config, stage, ds_path, plan), budget)
                if env.rank() == 0:
                    print(text)
                return 0
            if auto_batch:
                config = memory.auto_batch(memory.TypedRun(config, stage, ds_path, env.device().type), budget)
            trainer = Trainer(config, stage, out, ds_path, graph_encoder, overwrite)
        except (ValueError, OSError) as error:
            return _refuse(error)
        try:
            result = trainer.train()
            if repo and env.rank() == 0:
                tell(f"uploaded to {push(result, repo)}")
        except (ConfigError, OSError) as error:  # a run in use, a full disk; any other error from here on is a bug
            return _refuse(error)
    except (RuntimeError, MemoryError) as error:
        from sgg_fast.train.memory import advice as memory

        if not memory.is_out_of_memory(error):
            raise
        trainer = None
        traceback.clear_frames(error.__traceback__)  # this also frees the memory of the run
        return _refuse(memory.out_of_memory(memory.TypedRun(config, stage, ds_path, env.device().type)))
    except Stop as stop:
        return _stopped(stop)
    if env.rank() == 0:
        tell(f"saved {result}\nnext: {next_command(stage, name, out, args, file)}")
    return 0


def _refuse(reason: Exception | str) -> int:
    """`refuse`, in one line of the run's first process if it refuses too, else of the one that does.

    Before the processes have met, what they refuse is the same on a machine, and its first one says so.
    """
    from sgg_fast import env

    met = sys.modules.get("sgg_fast.train.run.processes")  # absent before torch is loaded
    if met is None or not met.have_met():
        return refuse(NAME, reason) if env.local_rank() == 0 else REFUSED
    if env.rank() == 0:
        met.say_refused()
        return refuse(NAME, reason)
    return REFUSED if met.first_refused() else refuse(f"{NAME}: process {env.rank()} of the run", reason)


def _stopped(stop: Stop) -> int:
    """End a run early; all processes stop alike, and the first one says so, unless one of them is lost."""
    from sgg_fast import env
    from sgg_fast.train.run import processes
    from sgg_fast.train.run.interrupts import LostProcess

    lost = isinstance(stop, LostProcess)
    if isinstance(stop, LostProcess) and not stop.is_late and env.rank() and processes.first_refused():
        return REFUSED
    if lost or env.rank() == 0:
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
            print(f"{NAME}: {stop}", file=sys.stderr)
    if lost and env.device().type == "cuda":  # a sum on the device, whose peer is lost, would hold the exit up
        sys.stderr.flush()
        os._exit(stop.exit_code)
    return stop.exit_code


def next_command(stage: str, recipe: str, out: Path, settings: dict[str, object], file: Path | None = None) -> str:
    """The command after this stage, with the given settings and the file of --settings."""
    from sgg_fast.config import as_flags, read_settings

    if stage == "finetune":
        return shlex.join([*typed("infer"), "graph.json", "--model", str(out)])
    # Without --deepspeed: one GPU, as this stage has it, needs least memory and no file so.
    words = [*typed("train"), "--stage", "finetune"]
    words += ["--settings", str(file)] if file else ["--recipe", recipe]
    words += ["--out", str(out)]
    known = read_settings(file) if file else {}
    given = {name: value for name, value in settings.items() if name != "pretrain_steps" and known.get(name) != value}
    return shlex.join([*words, *as_flags(given)])
