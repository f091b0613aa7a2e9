"""Measures how well a model's pictures follow their graphs: `python -m sgg_fast.eval --model RUN --out FOLDER`.

It draws every graph from each seed's noise, and counterfactual pairs: the same noise, one relation flipped. Existing
pictures are kept, so a stopped evaluation continues, and a larger --num or --seeds adds to it. It writes eval.json,
tables.md and sheet.png; every figure stands beside its floor, its ceiling and the detector's own accuracy.

--protocol paper instead draws one picture of every test graph of a prepared set with fixed settings, and compares
them with the real ones: FID and IS beside the published figures, in table.md, and what was compared in manifest.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.drawing.options import Options
from sgg_fast.files import check_text
from sgg_fast.quiet import quiet_libraries


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this command."""
    parser = OneLineParser(prog="python -m sgg_fast.eval", description=__doc__)
    parser.add_argument("--model", help="a run, a pipeline folder, toy or a hub id, as infer.py takes it")
    parser.add_argument(
        "--data",
        default="toy",
        help="graphs: toy (held-out scenes), toy-combinations (scenes with combinations held out of training scenes), "
        "toy-repeats (scenes with two of a kind and a chain), each also of toy-words, toy-words-combinations, "
        "toy-words-repeats; a JSON file, or a prepared set, whose test split is read (toy)",
    )
    parser.add_argument("--num", type=int, help="graphs drawn (100, or all where there are fewer)")
    parser.add_argument("--pairs", type=int, default=50, help="counterfactual pairs an axis, at most (50)")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each graph, from noise of as many seeds (1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of these seeds (0)")
    parser.add_argument("--steps", type=int, help="sampling steps (as the model's recipe)")
    parser.add_argument("--scheduler", help="scheduler that takes them, as infer.py names it (the model's own)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none (as the model's recipe)")
    parser.add_argument(
        "--relation-guidance", type=float, default=0.0, help="how hard the relations alone pull besides (0: no more)"
    )
    parser.add_argument(
        "--detector",
        help="toy, toy-words, folder or hub id of an OWL-ViT or OWLv2 of transformers, or none, which leaves objects "
        "and relations unmeasured (toy-words for its sets and those of combinations, else toy if it knows the names)",
    )
    parser.add_argument("--inception", type=Path, help="torch-fidelity's Inception weights file: adds FID and IS")
    parser.add_argument("--protocol", choices=("paper",), help="FID and IS with fixed settings, as docs/paper.md says")
    parser.add_argument(
        "--max-objects", type=int, help="with --protocol: most objects of a graph, as SGDiff draws 10 (all)"
    )
    parser.add_argument(
        "--dry", action="store_true", help="with --protocol: two steps and the toy's features, to try the command"
    )
    parser.add_argument("--against", type=Path, help="--out of another model's evaluation: adds paired differences")
    parser.add_argument("--out", type=Path, default=Path("outputs/eval"), help="folder to write (outputs/eval)")
    return parser.parse_args(argv)


FREE = ("model", "data", "inception", "protocol", "max_objects", "dry", "out")
"""Flags that may be given with --protocol; it fixes the others."""


def check_protocol(args: argparse.Namespace) -> None:
    """Check the flags of --protocol against the others. Raises ValueError."""
    if not args.protocol:
        if args.dry or args.max_objects is not None:
            raise ValueError("--dry and --max-objects belong to --protocol paper: give it too")
        return
    usual = vars(parse([]))
    if fixed := [name for name, value in vars(args).items() if name not in FREE and value != usual[name]]:
        raise ValueError(f"--protocol {args.protocol} fixes --{fixed[0].replace('_', '-')}: leave it out")
    if args.max_objects is not None and args.max_objects < 1:
        raise ValueError(f"--max-objects must be at least 1, not {args.max_objects}")
    if args.inception is None and not args.dry:
        from sgg_fast.eval.published import INCEPTION_URL

        raise ValueError(
            f"--protocol {args.protocol} needs --inception FILE, the original network (91 MB): download {INCEPTION_URL}"
        )


def check(args: argparse.Namespace) -> None:
    """Check the flags before libraries and models are loaded. Raises ValueError."""
    check_text(vars(args))
    check_protocol(args)
    for name in ("num", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("pairs", "first_seed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, not {getattr(args, name)}")
    checked = ("steps", "guidance", "relation_guidance", "scheduler")
    Options(**{name: getattr(args, name) for name in checked})
    data = Path(args.data)
    if not args.data.startswith("toy") and not data.exists():
        raise ValueError(f"--data {args.data}: neither toy, one of its kinds, nor a file or folder that is there")
    if data.is_file():
        from sgg_fast.data.formats import load_scene_graphs

        load_scene_graphs(data)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; give a folder")
    if args.inception and not args.inception.is_file():
        raise ValueError(
            f"--inception {args.inception}: there is no such file; it takes torch-fidelity's "
            "weights-inception-2015-12-05 file"
        )
    if args.against and not (args.against / "eval.json").is_file():
        raise ValueError(f"--against {args.against}: no eval.json there")


@command("sgg_fast.eval", interrupted="the same command goes on")
def main(argv: list[str] | None) -> None:
    """Exit code: 0 done, 130 interrupted; with one line on stderr 2 for unusable input, 3 for NaN or Inf."""
    args = parse(argv)
    check(args)
    quiet_libraries()
    if args.protocol:
        from sgg_fast.eval.protocol import run

        print(run(args))
        return
    from sgg_fast.eval.evaluate import evaluate

    print(evaluate(args))
