"""The matrix: every command on the stand-in for CUDA, against what is committed of it. `make first-contact`.

    python -m fake_cuda.matrix                       # all rows of rows.toml, two at a time
    python -m fake_cuda.matrix --rows pretrain infer # some
    python -m fake_cuda.matrix --quick               # the dozen that CI runs
    python -m fake_cuda.matrix --update              # write the counts of expected.json anew
    python -m fake_cuda.matrix --new                 # write those that are not there, and compare the others

Run it by the Python of a CUDA build of torch, without a GPU. Rows and what they assert stand in rows.toml; counts are
committed for one pair of torch and Triton, and are not compared under another.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import build, inputs
from .workers import Workers

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROWS, EXPECTED = HERE / "rows.toml", HERE / "expected.json"
STEPS = 3, 5
"""Of a training row: where its first command stops, and the one that resumes it."""
TRAIN = ("--checkpoint-every 2 --log-every 2 --validate-every 2 --sample-every 2 --num-samples 1 --sheet-steps 1 "
         "--num-scenes 32")  # fmt: skip
LIMIT = 1800
"""Seconds by the clock that a row may take; some compile hundreds of kernels."""
COUNTED = ("launches", "to_device", "to_host", "syncs", "waits", "replays")


@dataclasses.dataclass(frozen=True)
class Row:
    """See rows.toml."""

    name: str
    kind: str
    train: str = ""
    run: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    processes: int = 1
    """That torchrun would start, each on a device of its own."""
    code: int = 0
    """Exit code of the last command."""
    says: str = ""
    """What its output must have."""
    quick: bool = False
    """Whether CI runs it, where a CUDA build of torch is installed."""

    @property
    def counted(self) -> bool:
        """Whether its counts are committed; how much benchmarks and tests capture depends on time and on the tests."""
        return not any(line.startswith(("benchmarks.", "pytest ")) for line in self.run)

    def commands(self, places: dict[str, str]) -> list[list[str]]:
        """The words of each."""
        if not self.train:
            return [shlex.split(line.format(train=TRAIN, **places)) for line in self.run]
        flags = [*shlex.split(TRAIN), *shlex.split(self.train.format(**places)), "--out", places["out"]]
        return [["train.py", *flags, "--steps", str(steps)] for steps in STEPS]


@dataclasses.dataclass
class Result:
    """How a row went."""

    row: Row
    wrong: list[str]
    counts: dict[str, Any]
    seconds: float
    """Of the CPU, with all processes that it started and waited for."""


def read_rows() -> list[Row]:
    """Raises ValueError for a name that is there twice or a kind that is unknown."""
    rows = [Row(**{**one, "run": tuple(one.get("run", ()))}) for one in tomllib.loads(ROWS.read_text())["row"]]
    if len({row.name for row in rows}) != len(rows):
        raise ValueError(f"{ROWS.name}: a name is there twice")
    if strange := {row.kind for row in rows} - {"captured", "eager", "command"}:
        raise ValueError(f"{ROWS.name}: there is no kind {', '.join(strange)}")
    return rows


def chosen(rows: list[Row], names: Sequence[str] | None, quick: bool) -> list[Row]:
    """In the order of the names, if there are any. Raises ValueError for a name that no row has."""
    of = {row.name: row for row in rows}
    if unknown := set(names or ()) - of.keys():
        raise ValueError(f"{ROWS.name} has no row {', '.join(sorted(unknown))}")
    return [of[name] for name in names or of if of[name].quick or not quick]


def versions() -> str:
    """What committed counts are of."""
    return f"torch {version('torch').partition('+')[0]}, triton {version('triton')}"


def counts_of(row: Row, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What is committed of a row: nodes of its graphs, and the last step of every command.

    And the first step's launches where its capture is refused: gradients that it left would be added to.
    """
    steady = [{name: r["updates"][-1][name] for name in COUNTED} for r in reports if r["updates"]]
    found = {"graphs": [r["graphs"] for r in reports], "steady": steady}
    if "FAKE_CUDA_REFUSES_CAPTURES" in row.env:
        found["first"] = [r["updates"][0]["launches"] for r in reports if r["updates"]]
    return found


def judge(row: Row, reports: list[dict[str, Any]], expected: dict[str, Any] | None) -> list[str]:
    """Everything that is wrong with a row, a line each."""
    wrong = []
    for number, report in enumerate(reports):
        last = number == len(reports) - 1
        if report["code"] != (row.code if last else 0):
            wrong.append(f"{report['command']}: exit {report['code']} {report['error']}")
        wrong += [f"refused: {line}" for line in report["complaints"]]
        wrong += [f"step {i} was not applied" for i, u in enumerate(report["updates"]) if not u["applied"]]
        if row.train and len(report["updates"]) < 2:
            wrong.append(f"{len(report['updates'])} updates; two are wanted")
        if row.kind == "captured":
            wrong += _captured(report)
        elif row.kind == "eager" and report["graphs"] and not row.run:
            sheets = [nodes for u in report["updates"] for nodes in [u["graphs"]] if nodes]
            wrong += ["a graph was captured in a step"] if sheets else []
    found = counts_of(row, reports)
    if expected is not None and found != expected:
        wrong.append(f"counts {json.dumps(found)}, committed {json.dumps(expected)}")
    return wrong


def _captured(report: dict[str, Any]) -> list[str]:
    wrong = [f"launched beside a capture: {num} x {name}" for name, num in report["outside"].items()]
    if not any(update["graphs"] for update in report["updates"]):
        wrong.append("no step was captured")
    for number, update in enumerate(report["updates"]):
        if not update["replays"]:
            wrong.append(f"step {number} replayed nothing")
        if number and not update["graphs"] and update["syncs"]:
            wrong.append(f"step {number}: {update['syncs']} synchronisations")
    return wrong


class Matrix:
    """Where rows run: the library, the inputs, a folder for each row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        build.build(folder / "lib")
        self._made: dict[str, str] = {}
        path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "tests", HERE / "children"))
        plain = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "TRITON_INTERPRET")}
        self.plain = {**plain, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**plain, **build.environment(folder / "lib"), "PYTHONPATH": path}
        caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "XDG_CACHE_HOME": str(folder / "cache")}
        self.workers = Workers(ROOT, {**environment, **caches})
        if not (folder / "inputs" / inputs.DONE).is_file():
            words = [sys.executable, "-m", "fake_cuda.inputs", str(folder / "inputs")]
            subprocess.run(words, env=self.plain, check=True)

    def places(self, row: Row) -> dict[str, str]:
        """What stands in a row's commands."""
        out = self.folder / "rows" / row.name.replace(" ", "-").replace("/", "-")
        made = self.folder / "inputs"
        named = {name: str(made / name) for name in ("sd", "sd21", "sdxl", "clip", "set")}
        return {"out": str(out), "graphs": str(made / "graphs.json"), **named}

    def run(self, row: Row, expected: dict[str, Any] | None) -> Result:
        """Run a row in processes of its own."""
        places = self.places(row)
        out = Path(places["out"])
        subprocess.run(["rm", "-rf", str(out)], check=True)
        out.mkdir(parents=True)
        words: list[str] = []
        for number, command in enumerate(row.commands(places)):
            words += [*(["--"] if number else []), *command]
        logs = [out / f"log-{rank}.txt" for rank in range(row.processes)]
        written = [out / f"report-{rank}.json" for rank in range(row.processes)]
        env = {name: value.format(**places) for name, value in row.env.items()}
        seconds, late = self.workers.run(words, written, logs, env, LIMIT)
        if late:
            return Result(row, [f"stopped after {LIMIT} s: {logs[0]}"], {}, seconds)
        wrong, counts = [], {}
        for rank, (report, log) in enumerate(zip(written, logs, strict=True)):
            said = log.read_text(errors="replace")
            reports = json.loads(report.read_text()) if report.is_file() else []
            if len(reports) < len(row.commands(places)):
                wrong.append(f"the process died: {log}")
                continue
            wrong += judge(row, reports, None if rank else expected)
            wrong += [f"refused in a child: {line}" for line in refused(said) - refused_here(reports)]
            if not rank:
                counts = counts_of(row, reports)
                if row.says and row.says not in " ".join(said.split()):
                    wrong.append(f"nothing said {row.says!r}: {log}")
        return Result(row, wrong, counts, seconds)


def refused(said: str) -> set[str]:
    """Complaints of the stand-in in a log, those of processes that the row started included."""
    return set(re.findall(r"^fake CUDA: (.*)$", said, re.MULTILINE))


def refused_here(reports: list[dict[str, Any]]) -> set[str]:
    """Complaints that `judge` names already."""
    return {line for report in reports for line in report["complaints"]}


def line_of(result: Result) -> str:
    """For the terminal."""
    graphs = "/".join(str(nodes) for each in result.counts.get("graphs", []) for nodes in each)
    steady = (result.counts.get("steady") or [{}])[-1]
    numbers = " ".join(f"{name} {steady[name]}" for name in ("launches", "syncs", "replays") if name in steady)
    return (f"{'ok  ' if not result.wrong else 'FAIL'} {result.row.name:44} {result.row.kind:9} {numbers:38} "
            f"nodes {graphs[:40]:40} {result.seconds:5.0f} s")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a row is red."""
    parser = argparse.ArgumentParser(prog="python -m fake_cuda.matrix", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", help="default: all")
    parser.add_argument("--quick", action="store_true", help="the rows marked so")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "first-contact", help="what is made lies here")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="commit what these rows counted")
    parser.add_argument("--new", action="store_true", help="commit what the rows counted that have no counts yet")
    args = parser.parse_args(argv)
    try:
        rows = chosen(read_rows(), args.rows, args.quick)
    except ValueError as error:
        parser.error(str(error))
    everything = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
    known = {row.name for row in read_rows() if row.counted}
    everything = {of: {name: counts[name] for name in counts.keys() & known} for of, counts in everything.items()}
    committed = everything.setdefault(versions(), {})
    matrix, began, results = Matrix(args.folder), time.monotonic(), []
    print(f"{len(rows)} rows on the stand-in: {versions()}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        begun = [pool.submit(matrix.run, row, None if args.update else committed.get(row.name)) for row in rows]
        for done in concurrent.futures.as_completed(begun):
            result = done.result()
            print("\n".join([line_of(result), *(f"       {line}" for line in result.wrong)]), flush=True)
            results.append(result)
            missing = args.new and result.row.name not in committed
            if (args.update or missing) and result.row.counted and not result.wrong:
                committed[result.row.name] = result.counts
                write_expected(everything)
    matrix.workers.close()
    red = [result for result in results if result.wrong]
    if lacking := [row.name for row in rows if row.kind != "command" and row.name not in committed]:
        print(f"no counts are committed for {versions()}: {', '.join(lacking)} (--update)")
    print(f"{len(results) - len(red)} of {len(results)} green, {cpu_seconds():.0f} s of CPU, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return int(bool(red))


def cpu_seconds() -> float:
    """Of this process and of all that have ended under it: rows, the library's build, the inputs, imports."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def write_expected(everything: dict[str, Any]) -> None:
    """A row a line, so that a change reads as one in a diff."""
    parts = []
    for name, rows in sorted(everything.items()):
        lines = ",\n".join(f"  {json.dumps(row)}: {json.dumps(rows[row], sort_keys=True)}" for row in sorted(rows))
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    EXPECTED.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
