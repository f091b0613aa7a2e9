"""What the project wants to reach, what a model predicts of it and what was measured: `python -m benchmarks.targets`.

One row for each target and chip. A prediction is computed from committed counts (`baselines/steps.json`,
`baselines/launches.json`) by `counts/model.py` and `step_seconds` below; a memory plan comes from the planner. A
measurement names its kind: GPU (rows of a suite), CPU, stand-in (torch's own allocator on the stand-in for CUDA) or
count. Where nothing was measured on the chip, the verdict is the model's, and a target that the model misses shows its
largest term. Targets of single kernels: `ops/targets.py`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator

from benchmarks.counts import model, roofline
from benchmarks.counts.model import StepCounts
from benchmarks.counts.roofline import CHIPS, Chip
from benchmarks.harness.output import CsvRow, read_rows
from benchmarks.harness.readme_table import markdown
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

HERE = pathlib.Path(__file__).parent
MEMORY = HERE.parent / "tests" / "fake_cuda" / "memory.csv"
PRETRAIN_STEPS, FINETUNE_STEPS = 700_000, 30_000
"""The paper's schedule."""
AT_SCALE = {"call": "replay", "l2": "flushed"}
"""How a share of a copy's bandwidth is measured."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted value, and what it consists of: term -> its share, in the value's unit or as a time."""

    value: float
    terms: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> str:
        """Name of the largest term."""
        return max(self.terms, key=lambda name: self.terms[name]) if self.terms else "no term is known"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A measured value and its kind."""

    value: float
    kind: str
    """GPU, CPU, stand-in or count."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A value to reach on a chip."""

    what: str
    chip: str
    """Name of the chip; "any" for a count or a size."""
    bound: float
    unit: str
    at_least: bool = False
    predict: Callable[[], Prediction | None] = lambda: None
    measure: Callable[[list[CsvRow]], Measurement | None] = lambda rows: None

    def met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value >= self.bound if self.at_least else value <= self.bound

    def verdict(self, predicted: Prediction | None, measured: Measurement | None) -> str:
        """The measurement's word, else the model's."""
        if measured is not None and measured.kind != "CPU":
            return "met" if self.met(measured.value) else "missed"
        if predicted is None:
            return "not judged: no prediction, no row"
        if self.met(predicted.value):
            return "predicted: met"
        return f"predicted: missed; in the way: {predicted.largest}"


def _milliseconds(name: str, chip: Chip) -> Prediction | None:
    counts = model.steps().get(name)
    if counts is None:
        return None
    terms = {term: 1e3 * seconds for term, seconds in model.step_terms(counts, chip).items()}
    return Prediction(sum(terms.values()), terms)


def _large_batch(chip: Chip) -> Prediction | None:
    """Images a second at 512 x 512, batch 16: the counts of batch 2 at two sizes, continued in the number of pixels."""
    small, large = model.steps().get("finetune 256 b2"), model.steps().get("finetune 512 b2")
    if small is None or large is None:
        return None
    terms = model.step_terms(StepCounts.scaled(small, large, pixels=32), chip)
    return Prediction(16 / sum(terms.values()), terms)


def _schedule(chip: Chip) -> Prediction | None:
    """Minutes of both stages."""
    pretrain, finetune = _milliseconds("pretrain b2", chip), _milliseconds("finetune 256 b2", chip)
    if pretrain is None or finetune is None:
        return None
    terms = {
        f"{stage}: {term}": ms * steps / 6e4
        for stage, found, steps in (("pretrain", pretrain, PRETRAIN_STEPS), ("finetune", finetune, FINETUNE_STEPS))
        for term, ms in found.terms.items()
    }
    return Prediction(sum(terms.values()), terms)


def _per_second(name: str, chip: Chip) -> Prediction | None:
    found = _milliseconds(name, chip)
    return found and Prediction(1e3 / found.value, found.terms)


def _share(op: str, mode: str, chip: Chip) -> Prediction | None:
    """Percent of a copy's bandwidth on compulsory bytes, at 1e6 relations in bf16."""
    from benchmarks.ops.cases import Case
    from benchmarks.ops.registry import inputs

    seconds = model.seconds(op, mode, "1e6", "bf16", chip)
    if seconds is None:
        return None
    least = roofline.compulsory(op, mode, inputs(Case(op, mode, "1e6", "bf16"), "meta").shape, 2).seconds(chip)
    return Prediction(100 * least / seconds, {"bytes that are no compulsory ones, or instructions": seconds - least})


def _planned(form: str) -> CsvRow | None:
    with MEMORY.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["resolution"], row["batch"]) == ("512", "2")]
    return next((row for row in rows if row["form"] == form), None)


def _memory(form: str, bound: float) -> Target:
    def predict() -> Prediction | None:
        row = _planned(form)
        return row and Prediction(float(row["planned_gib"]), {f"peak in {row['planned_when']}": 1.0})

    def measure(rows: list[CsvRow]) -> Measurement | None:
        row = _planned(form)
        return row and Measurement(float(row["allocated_gib"]), "stand-in")

    return Target(f"peak memory, 512x512 batch 2, {form}", "any", bound, "GiB", predict=predict, measure=measure)


def _measured(chip: str, of: Callable[[CsvRow], float], **wanted: str) -> Callable[[list[CsvRow]], Measurement | None]:
    """The value of the first row with these cells that was measured on the chip."""

    def measure(rows: list[CsvRow]) -> Measurement | None:
        for row in rows:
            same = all(row.get(name) == cell for name, cell in wanted.items())
            if same and row.get("ms_p50") and chip in row.get("device", ""):
                return Measurement(of(row), "GPU")
        return None

    return measure


def _ms(row: CsvRow) -> float:
    return float(row["ms_p50"])


def _steps_a_second(row: CsvRow) -> float:
    """Of a row of `benchmarks.infer`: steps of its sampler by the time of a whole picture."""
    return 1e3 * int(row["shape"].split()[0]) / _ms(row)


def _launches() -> Measurement | None:
    counts = model.steps().get("unet 256 b2")
    return counts and Measurement(counts.compute.launches, "count")


def targets() -> Iterator[Target]:
    """All of them, in order of importance."""
    chips = {chip.name: chip for chip in CHIPS}

    def each(what: str, bounds: tuple[float, float], name: str, **row: str) -> Iterator[Target]:
        for chip, bound in zip(CHIPS, bounds, strict=True):
            predict = functools.partial(_milliseconds, name, chip)
            yield Target(what, chip.name, bound, "ms", predict=predict, measure=_measured(chip.name, _ms, **row))

    ours = {"op": "train_step", "backend": "captured"}
    yield from each("fine-tuning step, 256x256 batch 2", (27, 8), "finetune 256 b2", size="256x256 b2", **ours)
    yield from each("fine-tuning step, 512x512 batch 2", (66, 18), "finetune 512 b2", size="512x512 b2", **ours)
    many = _measured("H200", lambda row: 16e3 / _ms(row), size="512x512 b16", **ours)
    predict = functools.partial(_large_batch, chips["H200"])
    yield Target("fine-tuning, 512x512 batch 16", "H200", 165, "images/s", True, predict, many)
    for form, memory in (("ds.json", 10), ("split", 9), ("lean", 5), ("lean in backward", 3)):
        yield _memory(form, memory)
    graphs = {"form": "graphs", "sizes": "paper", "batch": "2"}
    yield from each("pre-training step, batch 2", (1.6, 1.2), "pretrain b2", **graphs)
    predict = functools.partial(_schedule, chips["RTX 4090"])
    yield Target("the paper's whole schedule", "RTX 4090", 30, "min", predict=predict)
    for chip, bound in zip(CHIPS, (66, 120), strict=True):
        predict = functools.partial(_per_second, "sampling 512 b2", chip)
        rate = _measured(chip.name, _steps_a_second, op="infer", backend="captured", size="512x512 b1")
        yield Target("sampling, 512x512, guided", chip.name, bound, "it/s", True, predict, rate)
    for op, mode, chip in itertools.product(("scatter_mean", "masked_pool"), ("fwd", "bwd"), CHIPS):
        predict = functools.partial(_share, op, mode, chip)
        row = {
            "op": op,
            "mode": mode,
            "dtype": "bf16",
            "size": "1e6",
            "backend": "ours",
            "call": "replay",
            "l2": "flushed",
        }
        share = _measured(chip.name, lambda found: 100 * float(found["copy_share"]), **row)
        yield Target(f"{op} {mode}, 1e6 relations, of a copy", chip.name, 85, "%", True, predict, share)
    yield Target("UNet's launches, 256x256 batch 2 (Inductor 1,182)", "any", 900, "launches",
                 measure=lambda rows: _launches())  # fmt: skip
    yield Target("host time of an op, of an empty autograd.Function", "any", 1.5, "x")
    yield Target("8 GPUs, captured, of 8 times one", "any", 90, "%", at_least=True)


def table(rows: list[CsvRow]) -> list[list[str]]:
    """A row of cells for each target. rows: of CSV files."""
    made = []
    for target in targets():
        predicted, measured = target.predict(), target.measure(rows)
        bound = f"{'>=' if target.at_least else '<='} {target.bound:g} {target.unit}"
        made.append([
            target.what, target.chip, bound,
            "" if predicted is None else f"{predicted.value:.3g}",
            "" if measured is None else f"{measured.value:.4g} ({measured.kind})",
            target.verdict(predicted, measured),
        ])  # fmt: skip
    return made


@command("benchmarks.targets", refused=(OSError, json.JSONDecodeError))
def main(argv: list[str] | None) -> None:
    """Print the table."""
    parser = OneLineParser(prog="python -m benchmarks.targets", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="*", type=pathlib.Path, metavar="CSV",
                        help="rows of a GPU suite, beside benchmarks/results")  # fmt: skip
    args: argparse.Namespace = parser.parse_args(argv)
    rows = [row for path in [*sorted((HERE / "results").glob("*.csv")), *args.rows] for row in read_rows(path)]
    header = ["what", "chip", "target", "predicted", "measured", "verdict"]
    print("\n".join(markdown(header, table(rows))))
