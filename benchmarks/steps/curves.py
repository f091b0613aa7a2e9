"""Curves of a pre-training run's validations from its log: a picture, and the numbers as CSV.

    python -m benchmarks.steps.curves runs/toy/pretrain/log.jsonl --out outputs/curves

It reads the log of `train.py --stage pretrain` and trains nothing. The picture needs matplotlib.
"""

from __future__ import annotations

import csv
import importlib.util
import pathlib
import sys
from typing import Any

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

CHANCE = "_at_chance"
PANELS = {
    "graph to image, top 1 and 5": ("graph_to_image_top1", "graph_to_image_top5"),
    "image to graph, top 1 and 5": ("image_to_graph_top1", "image_to_graph_top5"),
    "masked object's name": ("masked_object",),
}


def validations(log: pathlib.Path) -> list[dict[str, Any]]:
    """The log's validations, step by step. Raises ValueError for a line that no run writes."""
    from sgg_fast.train.run.log import read_log

    names = [end for panel in PANELS.values() for name in panel for end in (name, name + CHANCE)]
    found: list[dict[str, Any]] = []
    for number, _, fields in read_log(log):
        if fields.pop("event", None) != "validation":
            continue
        wrong = [name for name in {"step", *names, *fields} if type(fields.get(name)) not in (int, float)]
        if wrong or fields.keys() != (found or [fields])[0].keys():
            what = f"{min(wrong)} is not a number" if wrong else "other figures than the first validation"
            raise ValueError(f"{log}: line {number}: {what}: delete the line")
        found.append(fields)
    return found


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """One panel for each kind of accuracy, with chance as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 2.8), sharey=True)
    steps = [row["step"] for row in rows]
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for number, name in enumerate(names):
            colour = f"C{number}"
            axis.plot(steps, [row[name] for row in rows], color=colour, marker=".", label=name.rsplit("_", 1)[-1])
            axis.plot(steps, [row[name + CHANCE] for row in rows], color=colour, linestyle="--")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("held-out pairs (dashed: chance)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@command("curves")
def main(argv: list[str] | None) -> None:
    """Exit status 2 for a log without validations."""
    parser = OneLineParser(prog="python -m benchmarks.steps.curves", description=__doc__.split("\n\n")[0])
    parser.add_argument("log", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="DIR", help="folder for curves.csv and curves.png"
    )
    args = parser.parse_args(argv)
    rows = validations(args.log) if args.log.is_file() else []
    if not rows:
        raise ValueError(f"{args.log}: no validations in it; train with --validate-every")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    else:
        draw(rows, args.out / "curves.png")


if __name__ == "__main__":
    sys.exit(main())
