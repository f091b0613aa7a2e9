"""Draw scene graphs: `python infer.py graph.json` writes one PNG a graph and prints the paths."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

EXAMPLES = """examples:
  python infer.py graph.json                                  draws outputs/graph.png
  python infer.py "sheep standing on grass; sky above grass"  a graph in words; sheep#2 is a second sheep
  python infer.py "dog (in front of) house"                   a predicate in parentheses may be any words
  python infer.py --words                                     the words that the model was trained on
  python infer.py a.json b.jsonl --out pictures --grid        many graphs; run it again to go on where it stopped
  python infer.py outputs/graph.png --seed 7                  a picture carries its graph and settings
  python infer.py graph.json --edit "sheep -> dog"            before and after; also "add ...", "remove ..."
  python infer.py graph.json --show-graph --explain           the graph beside it; where each word had an effect
  cat graphs.jsonl | python infer.py - --json                 for scripts

files: JSON of sg2im, Visual Genome, LAION-SG or GQA, known by content; JSON lines; .txt with a graph in words a line
exit codes: 0 done, 2 input, settings or a model that cannot be used, 3 numbers went bad (one line on stderr each),
130 interrupted"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this script; flags that are fields of `sgg_fast.drawing.Options` have the names of the fields."""
    parser = OneLineParser(prog="infer.py", description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file of graphs, picture drawn here, graph in words, or - for stdin")
    add("--model", help="run of train.py, pipeline folder, hub id, or toy, which we ship (runs/toy if it is there)")
    add("--out", type=Path, help="PNG or folder to write (outputs); several of one name get -0, -1, ...")
    add("--base", metavar="MODEL", help="folder or hub id of the base of a LoRA run, if it lies elsewhere now")
    add("--seed", type=int, help="the same seed gives the same picture, and every graph the same noise (0)")
    add("--deterministic", action="store_true",
        help="on a GPU: the same bytes in every process; else a seed's picture may differ by rounding")  # fmt: skip
    add("--num-images", type=int, default=1, metavar="N", help="pictures of each graph, from seeds that count on (1)")
    add("--steps", type=int, help="denoising steps (as the model's recipe)")
    add("--guidance", type=float, help="how hard the graph pulls, 1 for no guidance (as the model's recipe)")
    add("--relation-guidance", type=float, metavar="R", help="how hard the relations alone pull besides (0: no more)")
    add("--scheduler", help="ddim, dpm++, euler, euler-a, heun, unipc, ... of diffusers (the model's)")
    add("--size", type=int, help="pixels a side (as trained)")
    add("--scale", type=int, default=1, metavar="N", help="save each picture N times as large, pixel by pixel (1)")
    add("--edit", dest="edits", action="append", default=[], metavar="CHANGE",
        help="'sheep -> dog', 'add hat on dog', 'remove hat'; repeatable; -edit.png shows both")  # fmt: skip
    add("--show-graph", action="store_true", help="also write -graph.png, the graph drawn beside the picture")
    add("--explain", action="store_true", help="also write -explain.png, where each object and relation had attention")
    add("--grid", action="store_true", help="also write all pictures on one sheet")
    add("--compile", action="store_true",
        help="draw by torch.compile, for many pictures: a minute or more before the first of a size")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (8); fewer take less memory")
    add(
        "--overwrite",
        action="store_true",
        help="draw again what is there already, and replace other files and pictures",
    )
    add("--verify", action="store_true", help="read every byte of the model, also what was found whole before")
    add("--quiet", action="store_true", help="no notices, no progress; errors and paths only")
    add("--json", action="store_true", help="print a JSON object a picture in place of its path; implies --quiet")
    add("--words", action="store_true", help="print the words that the model was trained on, and draw nothing")
    args = parser.parse_args(argv)
    if not (args.inputs or args.words):
        parser.error("the following arguments are required: INPUT")
    return args


@command("infer.py", interrupted="the same command goes on where it stopped")
def main(argv: list[str] | None) -> None:
    """Exit code: 0 done, 2 unusable input, 3 numbers that are not finite (one line on stderr each), 130 interrupted."""
    args = parse(argv)
    check_streams(sys.argv[1:] if argv is None else argv)
    tell_words(args) if args.words else draw(args)


def check_streams(argv: list[str]) -> None:
    """Raise ValueError for words that are not text, and for a closed stdout; afterwards every output can be printed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise ValueError("standard output is closed, so the paths of the pictures cannot be printed")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number, word in enumerate(argv, 1):
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ValueError(f"argument {number} ({ascii(word[:40])[1:-1]}): not UTF-8 text")


def tell_words(args: argparse.Namespace) -> None:
    """Print the words of the model. Raises ValueError or OSError for one that cannot be loaded."""
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    from sgg_fast.drawing import load_model
    from sgg_fast.drawing.vocabulary import known_words

    print(known_words(load_model(args.model, args.verify, args.base).pipeline.graph_encoder.config.trained_names))


def draw(args: argparse.Namespace) -> None:
    """Read, load, draw, print. Raises ValueError or OSError for unusable input, `NotFiniteError` for NaN or Inf."""
    from sgg_fast import drawing
    from sgg_fast.data.inputs import model_of, read_inputs
    from sgg_fast.drawing.edit import edited
    from sgg_fast.quiet import quiet_libraries, speak_plainly, uncollected

    speak_plainly()
    quiet = args.quiet or args.json
    # Errors that need no model are raised before the libraries are loaded, which takes seconds.
    items = read_inputs(args.inputs, quiet)
    names = drawing.Options.__dataclass_fields__
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    options = drawing.Options(**{**given, "edits": tuple(args.edits)})
    drawing.picture_paths(items, options)
    for item in items:
        edited(item.graph, options.edits)
    with uncollected():
        quiet_libraries()
        from sgg_fast.drawing.talk import Talk

        talk = Talk(quiet)
        model = drawing.load_model(args.model or model_of(items), args.verify, args.base)
    model.pipeline.compile_unet, model.pipeline.deterministic = args.compile, args.deterministic
    jobs = drawing.make_jobs(items, model, options)
    talk.begin(items, jobs, model)
    with talk.progress(len(jobs) * drawing.work(options)) as progress:
        for job in drawing.draw_jobs(jobs, model, options, progress):
            files = [str(path) for path in (job.path, *job.sheets.values())]
            talk.result(json.dumps(described(job, files, model)) if args.json else "\n".join(files))
    if options.grid:
        path = str(drawing.draw_grid(items, jobs, options))
        talk.result(json.dumps({"grid": path}) if args.json else path)


def described(job: Any, files: list[str], model: Any) -> dict[str, Any]:
    """The output of --json for one picture."""
    from sgg_fast.drawing import graph_notices

    return {**job.record, "files": files, "notices": graph_notices(model.pipeline, job.graph)}
