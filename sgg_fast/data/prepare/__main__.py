"""Command line of the preparation: one subcommand for each data set, and one for the cache. An error prints one line
and gives exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sgg_fast.commands import command, typed
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import SETTINGS, Config, add_flags, as_flags
from sgg_fast.data.images import RESIZE
from sgg_fast.data.prepare import coco, folder, laion, vg
from sgg_fast.data.prepare.coco import CocoFilters
from sgg_fast.data.prepare.encode import Filters
from sgg_fast.data.prepare.report import Report
from sgg_fast.files import check_text

AnyFilters = TypeVar("AnyFilters", Filters, CocoFilters)

VG_HELP = f"""\
Visual Genome 1.4 to {{train,val,test}}.h5 and vocab.json, in the layout that sg2im and SGDiff read.

--root holds {", ".join(vg.FILES[:5])},
{", ".join(vg.FILES[5:])}; a published vocab.json there is compared with the rebuilt one.
The defaults are sg2im's, and so are its habits with --names sg2im: object and attribute names are taken as they
are written; predicates are lower-cased, stripped and replaced by their alias in training images only. In the other
splits a predicate written "ON" is unknown and its relation is lost. --names clean treats all names of all splits
alike (lower-cased, stripped, aliases) and keeps more images than the paper counts.

Left out, counted and named in OUT/report.json: faulty records, and names that no graph can have. Boxes that reach over
the image's edge are kept as they are and counted, as are, with --names sg2im, boxes wholly outside it; with --names
clean these are faults. Fractions of pixels are rounded. Nothing is drawn at random. Files are read record by record;
memory grows with what is kept, not with the size of the JSON."""

COCO_HELP = f"""\
COCO-Stuff to {{train,val,test}}.jsonl: things and stuff of {{instances,stuff}}_{{train,val}}2017.json.

--root holds these files, itself or in annotations/, and the id lists of the first stuff challenge,
{coco.LISTS}/{{train,val}}-ids.txt (images one id a line). The paper counts {coco.PAPER["train"]} / {coco.PAPER["val"]} / {coco.PAPER["test"]}
images, which need the lists. Test images are the last of val2017, val the first.

Objects without a mask, or with one that cannot be read, are kept; the middle of their box stands for the mask's.
Relations (left of, right of, above, below, inside, surrounding) are not written: they are drawn when the set is opened,
by image id and number of the draw (train.py --relation-draws), from boxes and mask centres, the same ones everywhere."""  # noqa: E501

LAION_HELP = """\
LAION-SG to {train,val,test}.jsonl; open vocabulary, attributes in front of names, no boxes.

A record with a fault is left out whole, counted and named in OUT/report.json."""

FOLDER_HELP = """\
Your own pictures (png, jpg, webp), each with its graph beside it: scene.png and scene.json, in any layout that infer.py
reads. Every picture is decoded, and turned as its orientation tag says; what cannot be used is counted and named in
OUT/report.json."""

CACHE_HELP = """\
Runs the frozen models (VAE, CLIP) over a set once, and writes what train.py --data OUT then reads: latents, embeddings
and packed graphs, in files whose every byte is checked when they are opened.

Stop it at any moment: the same command goes on from the finished files. Give the recipe, models and data flags that
train.py will get. Changed images are read again; a changed set, model or setting is refused by name. Pictures that
cannot be used are left out, counted and named in OUT/report.json: files that are missing, empty, cut or larger than
Pillow's limit, CMYK and 16-bit pictures (no exact conversion to 8-bit RGB exists) and those with transparent pixels."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the command; `run` is the function of the subcommand."""
    parser = OneLineParser(prog="python -m sgg_fast.data.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name: str, title: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=title, description=text)
        made.set_defaults(run=run)
        made.add_argument("--out", type=Path, required=True, help="folder of the result")
        made.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")
        return made

    own = command("vg", "Visual Genome", VG_HELP, run_vg)
    own.add_argument("--root", type=Path, required=True, help="folder of the published files")
    own.add_argument("--compare-vocab", type=Path, help="published vocab.json (ROOT/vocab.json where there is one)")
    own.add_argument("--any-version", action="store_true", help="go on with annotations of another version than 1.4")
    _add_images(own, "VG_100K and VG_100K_2")
    _add_filters(own, Filters)
    own = command("coco", "COCO-Stuff", COCO_HELP, run_coco)
    own.add_argument("--root", type=Path, required=True, help="folder of the published files")
    own.add_argument("--all-images", action="store_true", help="go on without the id lists, with every image")
    _add_images(own, "train2017 and val2017")
    _add_filters(own, CocoFilters)
    own = command("laion-sg", "LAION-SG", LAION_HELP, run_laion)
    for split in ("train", "val", "test"):
        own.add_argument(
            f"--{split}", type=Path, required=split == "train", help=f"annotation file of the {split} split"
        )
    _add_images(own, "the downloaded pictures")
    own.add_argument("--resize", choices=RESIZE, default="crop", help="to the training square: crop it, or squash")
    own = command("folder", "your own pictures and graphs", FOLDER_HELP, run_folder)
    own.add_argument("--root", type=Path, required=True, help="folder of the pictures; may have subfolders")
    own.add_argument("--val-share", type=float, default=0.0, help="share of images set aside as val (%(default)s)")
    own.add_argument("--resize", choices=RESIZE, default="crop", help="to the training square: crop it, or squash")
    own = command("cache", "latents and embeddings of any of these", CACHE_HELP, run_cache)
    own.add_argument("--recipe", default="toy", help="named settings, as for train.py (%(default)s)")
    own.add_argument("--split", default="train", help="which split of the set (%(default)s)")
    own.add_argument("--workers", type=int, help="processes, spread over the GPUs (one a GPU)")
    own.add_argument("--shard-size", type=int, default=1024, help="images a file (%(default)s)")
    own.add_argument("--batch-size", type=int, default=32, help="images that the models read at once (%(default)s)")
    add_flags(own.add_argument_group("settings of the recipe"), for_cache=True)
    return parser.parse_args(argv)


def _add_images(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--images", type=Path, help=f"folder with {what}; becomes the link OUT/images")


def _add_filters(parser: argparse.ArgumentParser, kind: type[AnyFilters]) -> None:
    """Add one flag for each filter."""
    group = parser.add_argument_group("filters")
    for field in dataclasses.fields(kind):
        name = f"--{field.name.replace('_', '-')}"
        as_number = {"type": type(field.default), "metavar": "N"}
        how = {"choices": ("sg2im", "clean")} if field.name == "names" else as_number
        group.add_argument(name, default=field.default, help=f"{field.metadata['help']} (%(default)s)", **how)


def say(line: str) -> None:
    """Print progress to stderr; stdout holds the result."""
    print(line, file=sys.stderr)


def _filters(args: argparse.Namespace, kind: type[AnyFilters]) -> AnyFilters:
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def run_vg(args: argparse.Namespace) -> int:
    filters, own = _filters(args, Filters), (args.compare_vocab, args.any_version)
    return show(vg.prepare(args.root, args.out, filters, *own, args.overwrite, args.images, say), args.out)


def run_coco(args: argparse.Namespace) -> int:
    filters = _filters(args, CocoFilters)
    return show(coco.prepare(args.root, args.out, filters, args.images, args.all_images, args.overwrite, say), args.out)


def run_laion(args: argparse.Namespace) -> int:
    files = {split: path for split in ("train", "val", "test") if (path := getattr(args, split))}
    return show(laion.prepare(files, args.out, args.images, args.resize, args.overwrite, say), args.out)


def run_folder(args: argparse.Namespace) -> int:
    return show(folder.prepare(args.root, args.out, args.val_share, args.resize, args.overwrite, say), args.out)


def show(report: Report, out: Path) -> int:
    """Print the table of kept items; returns exit code 0."""
    print(report.table())
    print(f"\nwritten: {out}; every image and record left out is named in {out / 'report.json'}")
    return 0


def run_cache(args: argparse.Namespace) -> int:
    from sgg_fast.data.prepare.job import CacheJob
    from sgg_fast.quiet import quiet_libraries
    from sgg_fast.recipes import recipe

    given = {name: getattr(args, name) for name, s in SETTINGS.items() if s.rules.makes_cache and hasattr(args, name)}
    config = recipe(args.recipe, **given)
    config.check_given()
    workers = 1 if args.workers is None else args.workers
    job = CacheJob(
        config.model, config.data, config.run.seed, args.out, args.split, args.shard_size, args.batch_size, workers
    )
    source = job.open_source()  # its refusals do not wait for the libraries, which take seconds
    quiet_libraries()
    import torch

    from sgg_fast.data.prepare.cache import write_cache

    if args.workers is None:
        job = dataclasses.replace(job, workers=max(1, torch.cuda.device_count()))
    report = write_cache(job, args.overwrite, say, source)
    images = report["images"]
    print(f"{images['kept']} of {images['listed']} images, {report['samples']} samples")
    if report["turned_upright"]:
        print(f"- turned upright by their orientation tag: {report['turned_upright']}")
    for fault in report["faults"]:
        few = ", ".join(fault["images"][:3]) + (", ..." if fault["count"] > 3 else "")
        print(f"- left out: {fault['reason']}: {fault['count']} ({few})")
    print(f"\nwritten: {args.out}\nnext: {next_command(args, config, given, report['boxes'])}")
    return 0


def next_command(args: argparse.Namespace, config: Config, given: dict[str, Any], has_boxes: bool) -> str:
    """The next command after a cache, with the given flags: train.py checks that the cache was made with them."""
    given = {name: value for name, value in given.items() if name != "num_scenes"} | {"data": args.out}
    if not has_boxes and (config.objective.geometry or config.objective.attention_loss):
        given |= {"geometry": 0.0, "attention_loss": 0.0}
    return shlex.join([*typed("train"), "--stage", "pretrain", "--recipe", args.recipe, *as_flags(given)])


@command("prepare", interrupted="the same command goes on")
def main(argv: list[str] | None) -> int:
    """Exit code: 0 done, 2 for unusable files or settings (one line on stderr), 130 if interrupted."""
    args = parse(argv)
    check_text({name: value for name, value in vars(args).items() if name != "run"})
    return args.run(args)
