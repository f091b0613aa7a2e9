"""Compares SGG-IG with its baselines and with its own ablations, on the toy world: Tables 1 to 4, measured.

    python -m benchmarks.quality --budget full --only table1 --seeds 3 --jobs 2
    python -m benchmarks.quality --budget full --seeds 1 --jobs 2
    python -m benchmarks.quality --budget full --report

Every system starts from the same foundation, trains for as many steps on the same scenes and draws the same held-out
graphs from the same noise. A cell is one system under one seed: a run of train.py and an evaluation by `sgg_fast.eval`,
in a folder of its own with the commands to repeat it. Finished cells are kept and an interrupted one continues; tables
and figures show the finished cells. `--report` makes them of all there are, and runs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.quality import plan as plans
from benchmarks.quality.plan import Cell, Sizes, System, Work
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this command."""
    parser = OneLineParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", default="1h", help="time to fill: 1h, 30m, 90s; or full, whatever it takes (1h)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each system (3)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (1)")
    parser.add_argument("--only", choices=plans.TABLES, help="one of the tables")
    parser.add_argument("--model", default="", help="foundation, as for train.py (that of `toy-words`, which ships)")
    parser.add_argument("--precision", default="auto", help="as for train.py; bf16 is faster on a CPU with AMX (auto)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the cells (runs/quality)")
    parser.add_argument("--results", type=Path, help="folder of tables and figures, quality_* (as --out)")
    parser.add_argument("--dry", action="store_true", help="print the plan, run no cell")
    parser.add_argument("--report", action="store_true", help="tables and figures of the finished cells, run no cell")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> int:
    """Plan, run what is missing, and write the tables; returns exit code 0, or 1 if cells failed."""
    systems = plans.chosen(args.only)
    if args.report:
        return report(args, systems)
    work = Work.of(systems, args.seeds)
    sizes = _sizes(args, work)
    cells = [Cell(system, seed) for seed in range(args.seeds) for system in systems]
    missing = sum(not cell.done(args.out) for cell in cells)
    print(f"{len(cells)} cells, {missing} of them to run; each: {_described(sizes)}", flush=True)
    for line in plans.cut(sizes):
        print(f"  cut: {line}")
    print(f"the full comparison: {_full(args)}", flush=True)
    if args.dry:
        for cell in cells:
            print(f"  {'done' if cell.done(args.out) else 'to run'}: {cell.system.name}, seed {cell.seed}")
        return 0
    failed = run(args, sizes, systems, cells)
    for line in failed:
        print(f"quality: {line}", file=sys.stderr)
    return 1 if failed else 0


def report(args: argparse.Namespace, systems: list[System]) -> int:
    """Write the tables and figures of the finished cells; returns exit code 0. Raises ValueError if there are none."""
    sizes = plans.stored(args.out, args.budget, _given(args))
    text = write(args, sizes, systems, figures=True) if sizes else ""
    if not text:
        raise ValueError(f"--report: no finished cell of these seeds in {args.out}; without --report they are run")
    print(text)
    return 0


def _sizes(args: argparse.Namespace, work: Work) -> Sizes:
    """The sizes stored in the folder, else those that fit the budget at the speeds measured here."""
    sizes = plans.stored(args.out, args.budget, _given(args))
    seconds = plans.budget_seconds(args.budget)
    if sizes is not None:
        return sizes
    from benchmarks.quality.cells import measure
    from sgg_fast import env
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    print("measuring the speed of a step", file=sys.stderr, flush=True)
    speeds = measure(args.out, _given(args))
    on_gpu = env.device().type == "cuda"
    lanes = 1 if on_gpu else min(args.jobs, os.cpu_count() or 1)  # cells on one GPU share it
    sizes = plans.FULL if seconds is None else plans.fit(lanes * seconds, work, speeds)
    print(
        f"on {'this GPU' if on_gpu else 'a core of this CPU'}: {speeds.finetune_image * 1e3:.0f} ms an image of "
        f"fine-tuning, {speeds.pretrain_graph * 1e3:.0f} ms a graph of pre-training, {speeds.draw_step * 1e3:.0f} ms a "
        f"sampling step of a picture; predicted: {plans.seconds_of(sizes, work, speeds) / lanes / 60:.0f} minutes "
        f"with {args.jobs} at a time{'' if on_gpu else ' where nothing else runs'}"
    )
    if not args.dry:
        plans.store(args.out, args.budget, sizes, _given(args))
    return sizes


def _given(args: argparse.Namespace) -> dict[str, str]:
    """Fields of the recipe that the command names."""
    return {"model": args.model, "precision": args.precision}


def _described(sizes: Sizes) -> str:
    return (
        f"{sizes.pretrain_steps} + {sizes.finetune_steps} steps at batch {sizes.batch_size} on {sizes.num_scenes} "
        f"scenes; {sizes.num_graphs} graphs and their pairs x {plans.NOISE_SEEDS} noises, {sizes.draw_steps} "
        f"{plans.SCHEDULER} steps"
    )


def _full(args: argparse.Namespace) -> str:
    out = Path("runs") / f"{args.out.name}-full"  # not a path of this machine, because it is written to the results
    only = f" --only {args.only}" if args.only else ""
    return f"python -m benchmarks.quality --budget full --seeds 5 --jobs {args.jobs}{only} --out {out}"


def run(args: argparse.Namespace, sizes: Sizes, systems: list[System], cells: list[Cell]) -> list[str]:
    """Run everything that is missing, with the tables after every cell; returns one line for each failure."""
    from benchmarks.quality.cells import Task, prepare, run_all

    begun = time.monotonic()
    prepare(args.out, sizes, args.model)
    total, done = len(cells), sum(cell.done(args.out) for cell in cells)

    def after(task: Task, seconds: float) -> None:
        nonlocal done
        if isinstance(task, Cell):
            done += 1
        name = task.system.name if isinstance(task, Cell) else f"pre-training {task.folder(args.out).parent.name}"
        minutes = (time.monotonic() - begun) / 60
        line = f"{minutes:6.1f} min  {done}/{total}  {name}, seed {task.seed}: {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)
        if isinstance(task, Cell) and done < total:
            write(args, sizes, systems, figures=False)

    failed = run_all(args.out, sizes, cells, _given(args), args.jobs, after)
    print(write(args, sizes, systems, figures=True))
    return failed


def write(args: argparse.Namespace, sizes: Sizes, systems: list[System], figures: bool) -> str:
    """Write tables, and at the end figures, of the finished cells; returns the tables, "" if no cell is done."""
    from benchmarks.quality import tables as quality_tables

    comparison = quality_tables.Comparison(args.out, systems, range(args.seeds))
    if not comparison.results:
        return ""
    results = args.results or args.out
    results.mkdir(parents=True, exist_ok=True)
    names = quality_tables.with_rows(comparison, [args.only] if args.only else plans.TABLES)
    cut = "; ".join(plans.cut(sizes))
    absent = ", ".join(f"`{system.name}`" for system in systems if system not in comparison.results)
    text = "\n\n".join(
        [
            "# Quality on the toy world",
            f"Written by `python -m benchmarks.quality --budget {args.budget} --seeds {args.seeds} --precision "
            f"{args.precision}{' --report' if args.report else ''}`. Each cell: {_described(sizes)}.",
            f"Cut from the full comparison (`{_full(args)}`): {cut}. So few pictures and steps leave wide intervals: "
            "one that holds 0 says that this run cannot tell, not that there is no difference."
            if cut
            else "Nothing was cut.",
            *plans.notes(args.out),
            *([f"No finished cell: {absent}."] if absent else []),
            quality_tables.explanation(comparison),
            quality_tables.tables(comparison, names),
        ]
    )
    (results / "quality.md").write_text(text + "\n", encoding="utf-8")
    quality_tables.write_csv(results / "quality.csv", comparison, names)
    if figures:
        if "table1" in names:
            quality_tables.draw_sheet(results / "quality_sheet.png", comparison)
        quality_tables.draw_bars(results / "quality_bars.png", comparison, names)
    return text


@command("quality", interrupted="the same command goes on")
def main(argv: list[str] | None) -> int:
    """Exit code: 0 done, 1 if cells failed, 2 for unusable input (one line on stderr), 130 interrupted."""
    args = parse(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.model and (Path(args.model) / "graph_encoder").is_dir():
        raise ValueError(
            f"--model {args.model} has a graph_encoder, from which the rows without pre-training would start: give a "
            "copy without it"
        )
    return compare(args)
