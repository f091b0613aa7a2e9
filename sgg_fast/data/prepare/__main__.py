"""Command line of the preparation: one subcommand a data set. Exit code 2 and one line for what cannot run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from sgg_fast.data.prepare.encode import Filters
from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.vg import FILES, prepare

VG_HELP = f"""\
Visual Genome 1.4 to {{train,val,test}}.h5 and vocab.json, in the layout that sg2im and SGDiff read.

--root holds {", ".join(FILES[:5])},
{", ".join(FILES[5:])}; a published vocab.json there is compared with the rebuilt one.
The defaults are sg2im's, and so are its habits with --names sg2im: object and attribute names are taken as they
are written; predicates are lower-cased, stripped and replaced by their alias in training images only. In the other
splits a predicate written "ON" is unknown and its relation is lost. --names clean treats all names of all splits
alike (lower-cased, stripped, aliases) and keeps more images than the paper counts.

Left out, counted and named in OUT/report.json: faulty records. Boxes that reach over the image's edge are kept as
they are and counted; boxes wholly outside it are faults. Nothing is drawn at random. Files are read record by record;
memory grows with what is kept, not with the size of the JSON."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the command; one a filter."""
    parser = argparse.ArgumentParser(prog="python -m sgg_fast.data.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    vg = commands.add_parser("vg", help="Visual Genome", description=VG_HELP, allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    vg.add_argument("--root", type=Path, required=True, help="folder of the published files")
    vg.add_argument("--out", type=Path, required=True, help="folder of the result; may hold the images already")
    vg.add_argument("--compare-vocab", type=Path, help="published vocab.json (ROOT/vocab.json where there is one)")
    vg.add_argument("--any-version", action="store_true", help="go on with annotations of another version than 1.4")
    vg.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")
    filters = vg.add_argument_group("filters")
    for field in dataclasses.fields(Filters):
        name = f"--{field.name.replace('_', '-')}"
        kind = {"choices": ("sg2im", "clean")} if field.name == "names" else {"type": int, "metavar": "N"}
        filters.add_argument(name, default=field.default, help=f"{field.metadata['help']} (%(default)s)", **kind)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 for files or settings that cannot be used (one line on stderr)."""
    args = parse(argv)
    try:
        filters = Filters(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Filters)})
        report = prepare(
            args.root, args.out, filters, args.compare_vocab, args.any_version, args.overwrite,
            say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
    except (PrepareError, OSError) as error:
        print(f"prepare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(report.table())
    print(f"\nwritten: {args.out}; every image and record left out is named in {args.out / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
