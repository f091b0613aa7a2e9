"""The systems that `benchmarks.quality` compares, and the sizes that fit a budget. It runs nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from sgg_fast.files import write_text
from sgg_fast.recipes import toy_words

COMMON: dict[str, Any] = {
    "accumulation_steps": 1,
    "ema": 0.0,
    "warmup_steps": 20,
    "validation_pairs": 0,
    "validate_every": 0,
    "sample_every": 0,
    "num_samples": 0,
    "log_every": 25,
}
"""Fields of the recipe `toy-words` that all runs of the comparison share."""
GRAPHS = "toy-words-repeats"
"""The set of the evaluation: held-out scenes with two of a kind and a chain of relations."""
SCHEDULER = "dpm++"
NOISE_SEEDS = 2
"""Pictures of each graph and of its flipped one, per cell."""
TABLES = ("table1", "table2", "table3", "table4")
BOX_LOSSES = ("geometry", "attention_loss")
WHOLE = toy_words()
"""SGG-IG with all its parts."""


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A row of a table; compared by identity."""

    name: str
    tables: tuple[str, ...]
    settings: dict[str, Any]
    """Fields of `Config` beside `COMMON`, in fine-tuning."""
    pretraining: dict[str, Any] | None = None
    """Those in pre-training; None without any."""
    trained: bool = True

    @property
    def slug(self) -> str:
        """Name in folders."""
        return _slug(self.name)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _baseline(name: str, table: str, trained: bool = True, boxes: tuple[str, ...] = (), **own: Any) -> System:
    given = {field: getattr(WHOLE.objective, field) for field in boxes}
    return System(name, (table,), {"instance_codes": False, **own, **given}, None, trained)


def _papers_parts(mae: bool, con: bool, isa: bool) -> System:
    parts = [name for name, used in (("MAE", mae), ("con", con), ("ISA", isa)) if used]
    whole = mae and con and isa
    return System(
        "sgg" if whole else f"sgg, {' + '.join(parts) or 'none'}",
        TABLES if whole else ("table2",),
        {} if isa else {"loss_weight": 1.0},
        {**({} if mae else {"mae_weight": 0.0}), **({} if con else {"con_weight": 0.0})} if mae or con else None,
    )


def _without(what: str, *tables: str, **own: Any) -> System:
    """SGG-IG under other settings in both stages; the attention loss is fine-tuning's alone."""
    before = {name: value for name, value in own.items() if name != "attention_loss"}
    return System(f"sgg, no {what}", tables, own, before)


PARTS = ("MAE", "L_con", "L_ISA")
"""The parts of the paper that Table 2 leaves out, alone and together."""
FACTORIAL = {used: _papers_parts(*used) for used in itertools.product((True, False), repeat=len(PARTS))}
"""Whether each of `PARTS` is used -> the row of Table 2."""
SGG = FACTORIAL[True, True, True]
"""The row of SGG-IG, in all tables."""
SYSTEMS: tuple[System, ...] = (
    _baseline("text, zero-shot", "table1", trained=False, conditioner="text", text_form="phrases"),
    _baseline("text, phrases", "table1", conditioner="text", text_form="phrases"),
    _baseline("sgdiff", "table1", conditioner="sgdiff"),
    *FACTORIAL.values(),
    _without("graph negatives", "table3", graph_negatives=False),
    _without("geometry", "table3", geometry=0.0),
    _without("attention loss", "table3", attention_loss=0.0),
    _without("open gate", "table3", gate_init=0.0),
    _without("instance codes", "table3", instance_codes=False),
    _without("box losses", "table3", "table4", geometry=0.0, attention_loss=0.0),
    _baseline("text, phrases, box losses", "table4", boxes=BOX_LOSSES[1:], conditioner="text", text_form="phrases"),
    _baseline("sgdiff, box losses", "table4", boxes=BOX_LOSSES, conditioner="sgdiff"),
    _baseline("text, sentence", "table4", conditioner="text", text_form="sentence", relation_dropout=0.0),
    _baseline("text, numbered", "table4", conditioner="text", text_form="numbered", relation_dropout=0.0),
)
"""Table 1: SGG-IG and its baselines. Table 2: the masked auto-encoder, L_con and L_ISA, each with and without. Table 3:
parts that are not the paper's. Table 4: baselines with the losses about boxes that can be given to them, SGG-IG without
any, and other forms of text."""
BASELINES = tuple(system for system in SYSTEMS if "conditioner" in system.settings)


def chosen(only: str | None) -> list[System]:
    """The systems of a table, or all."""
    return [system for system in SYSTEMS if only is None or only in system.tables]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One system under one seed: a run of train.py and an evaluation of it."""

    system: System
    seed: int

    def folder(self, out: Path) -> Path:
        """Folder of the run; the evaluation is in its `eval`."""
        return out / "cells" / self.system.slug / f"seed-{self.seed}"

    def done(self, out: Path) -> bool:
        """Whether its evaluation exists."""
        return (self.folder(out) / "eval" / "eval.json").is_file()


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A pre-training that cells with the same settings and seed share."""

    own: tuple[tuple[str, Any], ...]
    """Fields of `Config` beside `COMMON`."""
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Pretraining | None:
        """The one that the cell needs."""
        own = cell.system.pretraining
        return None if own is None else cls(tuple(sorted(own.items())), cell.seed)

    def folder(self, out: Path) -> Path:
        """Folder of the run."""
        words = " ".join(f"{name} {value}" for name, value in self.own)
        return out / "pretrained" / (_slug(words) or "whole") / f"seed-{self.seed}"

    def done(self, out: Path) -> bool:
        """Whether its graph encoder exists."""
        return (self.folder(out) / "pretrain" / "graph_encoder").is_dir()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The amounts of training and drawing of every cell."""

    batch_size: int
    pretrain_steps: int
    finetune_steps: int
    num_scenes: int
    num_graphs: int
    """Each is drawn `NOISE_SEEDS` times, and as often with a relation flipped."""
    draw_steps: int

    @property
    def pictures(self) -> int:
        """Pictures of a cell; a few graphs have a second flipped one."""
        return 2 * NOISE_SEEDS * self.num_graphs


FULL = Sizes(32, 2500, 1500, 8000, 250, 25)
"""The sizes of `--budget full`."""
LEAST = Sizes(8, 16, 8, 64, 4, 12)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Seconds on this machine; on a CPU these are processor time, so other load does not count."""

    finetune_image: float
    """Fine-tuning step, per image."""
    pretrain_graph: float
    draw_step: float
    """Sampling step, per picture, guidance included."""
    scene: float = 0.02
    """Drawing and encoding one scene."""
    run: float = 5.0
    """Set-up and export of one run."""
    evaluation: float = 12.0
    """One evaluation without the drawing: detector, tables, sheet."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Number of runs of each kind in a plan."""

    finetunings: int
    pretrainings: int
    evaluations: int

    @classmethod
    def of(cls, systems: list[System], seeds: int) -> Work:
        """Count the runs; cells with the same pre-training share it."""
        shared = {Pretraining.of(Cell(system, 0)) for system in systems} - {None}
        return cls(seeds * sum(system.trained for system in systems), seeds * len(shared), seeds * len(systems))


DRAWING = 0.3
"""Share of the budget for evaluation."""


def seconds_of(sizes: Sizes, work: Work, speeds: Speeds) -> float:
    """Seconds of a plan that runs sequentially."""
    training = work.finetunings * sizes.finetune_steps * speeds.finetune_image
    training += work.pretrainings * sizes.pretrain_steps * speeds.pretrain_graph
    drawing = work.evaluations * sizes.pictures * sizes.draw_steps * speeds.draw_step
    return sizes.batch_size * training + drawing + _fixed(work, speeds) + sizes.num_scenes * speeds.scene


def _fixed(work: Work, speeds: Speeds) -> float:
    return (work.finetunings + work.pretrainings) * speeds.run + work.evaluations * speeds.evaluation


def fit(seconds: float, work: Work, speeds: Speeds) -> Sizes:
    """The sizes that need `seconds` sequentially; never above `FULL`, never below `LEAST`.

    The batch is the largest at which 400 steps fit, else the least: fewer steps do not train the UNet.
    """
    free = max(seconds - _fixed(work, speeds), 0.0)
    draw_steps = FULL.draw_steps if free > 20_000 else LEAST.draw_steps
    a_graph = 2 * NOISE_SEEDS * draw_steps * speeds.draw_step * work.evaluations
    num_graphs = _between(LEAST.num_graphs, DRAWING * free / a_graph, FULL.num_graphs)
    training = free - num_graphs * a_graph
    ratio = FULL.pretrain_steps / FULL.finetune_steps
    for batch_size in (FULL.batch_size, 16, LEAST.batch_size):
        # One scene for every image that fine-tuning reads, up to the full set.
        an_image = work.finetunings * speeds.finetune_image + ratio * work.pretrainings * speeds.pretrain_graph
        steps = training / (batch_size * (an_image + speeds.scene))
        if steps >= 400:
            break
    finetune_steps = _between(LEAST.finetune_steps, steps, FULL.finetune_steps)
    return Sizes(
        batch_size,
        _between(LEAST.pretrain_steps, ratio * finetune_steps, FULL.pretrain_steps),
        finetune_steps,
        _between(LEAST.num_scenes, finetune_steps * batch_size, FULL.num_scenes),
        num_graphs,
        draw_steps,
    )


def _between(low: int, value: float, high: int) -> int:
    return max(low, min(high, math.floor(value)))


def budget_seconds(text: str) -> float | None:
    """Convert "1h", "30m", "90s" to seconds, and "full" to None. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", text)
    if text == "full":
        return None
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--budget {text}: say it as 1h, 30m or 90s, or full")
    return float(found[1]) * {"h": 3600, "m": 60, "s": 1}[found[2]]


def stored(out: Path, budget: str, given: dict[str, str]) -> Sizes | None:
    """The sizes of the folder's cells. Raises ValueError if their budget or a given field of the recipe differs."""
    path = out / "plan.json"
    if not path.is_file():
        return None
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        sizes, was = Sizes(**there["sizes"]), {"budget": there["budget"], **there["given"]}
        if not all(type(size) is int and size > 0 for size in vars(sizes).values()):
            raise ValueError("sizes must be whole numbers from 1")
        said = there.get("notes", [])
        if type(said) is not list or not all(type(note) is str for note in said):
            raise ValueError("notes must be a list of sentences")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete {out}, or give another --out") from error
    for name, value in {"budget": budget, **given}.items():
        if was.get(name) != value:
            raise ValueError(
                f"--out {out} holds a comparison with --{name} {was.get(name)!r}, not {value!r}: give another"
            )
    return sizes


def store(out: Path, budget: str, sizes: Sizes, given: dict[str, str]) -> None:
    """Store the sizes and the given fields of the recipe for every later call."""
    content = {"budget": budget, "sizes": dataclasses.asdict(sizes), "given": given}
    write_text(out / "plan.json", json.dumps(content, indent=1) + "\n")


def notes(out: Path) -> list[str]:
    """Sentences about the cells, for the tables: "notes" in plan.json, which `stored` has found readable."""
    return json.loads((out / "plan.json").read_text(encoding="utf-8")).get("notes", [])


def cut(sizes: Sizes) -> list[str]:
    """The reductions against the full comparison, as text."""
    lines = []
    for field in dataclasses.fields(Sizes):
        mine, full = getattr(sizes, field.name), getattr(FULL, field.name)
        if mine != full:
            lines.append(f"{field.name.replace('_', ' ').removeprefix('num ')}: {mine} of {full}")
    return lines
