"""Measures the pre-training step for `benchmarks.train_step`: the naive form and ours, with counted launches.

Rows: `naive` (frozen CLIP towers in the loop, a DataLoader, torch's Adam), `cached` (frozen models do not run,
reference operators), `kernels` (Triton), `graphs` (the whole step captured as one CUDA graph). The auto-encoder's first
loss of each form is compared with the naive one's before timing. On a CPU the last two are not timed; with
TRITON_INTERPRET=1 the launches of `kernels` are counted there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sgg_kernels.launch import intercept
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.counts.kernels import OpCounter
from benchmarks.harness import measure
from benchmarks.harness.output import Output, Row, device_of, text
from benchmarks.ops import registry
from benchmarks.steps.forms import PRETRAIN
from sgg_fast import ops
from sgg_fast.data.cache import TrainingCache, encode_images
from sgg_fast.data.sources import PairSource, toy_source
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.clip import embed_names
from sgg_fast.nn.foundation import Foundation
from sgg_fast.quiet import quiet_libraries
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation, toy_tokenizer
from sgg_fast.train.assemble import assemble, new_conditioner
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.memory.blank import blank_foundation
from sgg_fast.train.order import SampleOrder
from sgg_fast.train.stages import PretrainStage

BATCHES = (2, 64)
NUM_PAIRS = 512
"""Size of the training set: enough for batches to differ."""

ADAM_BYTES = 28
"""Per parameter: weight, gradient and two moments read, weight and moments written; all in fp32."""

TOLERANCE = 1e-3
"""Relative, of the first auto-encoder loss."""


@dataclasses.dataclass
class PretrainRow(Row):
    """One form at one batch size."""

    form: str
    sizes: str
    batch: int
    images_per_s: float | None = None
    triples_per_s: float | None = None
    """Relations of the full copies per second, image relations included."""
    library_launches: int | None = None
    """Launches of torch's operators in one step: on a CPU operators that run a kernel, on a GPU by the profiler."""
    triton_launches: int | None = None
    floor_ms: float | None = None
    """The optimiser's compulsory bytes at this machine's own copy bandwidth."""
    over_floor: float | None = None
    parameters: int | None = None

    def line(self) -> str:
        numbers = self.status
        if self.ms_p50 is not None:
            numbers = (f"{self.ms_p50:9.2f} ms {self.triples_per_s:10.0f} triples/s {self.over_floor:7.1f} x floor "
                       f"({self.floor_ms:.3f} ms)")  # fmt: skip
        launches = f"launches: library {text(self.library_launches)}, Triton {text(self.triton_launches)}"
        return f"batch {self.batch:4} {self.form:8} {numbers}; {launches}"


PAPERS_FORMS: dict[str, Any] = {"contrastive": "bce", "graph_negatives": False, "geometry": 0.0}
"""Settings of vg256, so both sizes time the same step."""


class Setup:
    """Pairs, frozen models and settings that all forms share."""

    def __init__(self, toy: bool, device: torch.device) -> None:
        self.device, self.sizes = device, "toy" if toy else "paper"
        if toy:
            self.config, self.foundation = recipe("toy", **PAPERS_FORMS), toy_foundation()
            self.source = toy_source(0, NUM_PAIRS, self.config.data.resolution)
        else:
            self.config = recipe("vg256")
            words = toy_tokenizer()
            self.foundation = dataclasses.replace(
                blank_foundation(self.config.model), tokenizer=words, clip_tokenizer=words
            )
            self.source = random_pairs(NUM_PAIRS, self.config.data.resolution)
        self.foundation.clip.to(device)
        pictures = [self.source.load_image(i) for i in range(NUM_PAIRS)]
        chunks = [np.stack(pictures[k : k + 32]) for k in range(0, NUM_PAIRS, 32)]
        images = [encode_images(chunk, self.foundation, device, False)[0] for chunk in chunks]
        self.cache = encoded(self.source.graphs, torch.cat(images), self.foundation, device)

    def stage(self, batch: int) -> PretrainStage:
        """A stage with the same fresh weights at every call."""
        config = self.config.replace(batch_size=batch)
        conditioner = new_conditioner(config.model, config.run.seed, self.foundation, self.cache)
        stage = assemble(config, "pretrain", self.foundation, conditioner, self.cache, self.device)
        assert isinstance(stage, PretrainStage)
        return stage


def encoded(
    graphs: list[SceneGraph], images: torch.Tensor, foundation: Foundation, device: torch.device
) -> TrainingCache:
    """Pack the graphs and embed their names."""
    table = NameTable()
    packed = SceneGraphBatch.from_graphs(graphs, table).to(device)
    names = embed_names(foundation.clip, foundation.clip_tokenizer, table.spoken())
    return TrainingCache(packed, table, names, images, None)


def random_pairs(num: int, resolution: int) -> PairSource:
    """Random pictures, each with a graph of Visual Genome's sizes and vocabulary."""
    rng = np.random.default_rng(0)
    graphs = []
    for num_objects, num_relations in registry.sizes_like_visual_genome(num, rng).tolist():
        ends = rng.integers(0, num_objects, (num_relations, 2))
        ends[:, 1] = np.where(ends[:, 0] == ends[:, 1], (ends[:, 1] + 1) % num_objects, ends[:, 1])
        predicates = rng.integers(0, 45, num_relations).tolist()
        relations = tuple((s, f"predicate {p}", o) for (s, o), p in zip(ends.tolist(), predicates, strict=True))
        graphs.append(SceneGraph(tuple(f"object {k}" for k in rng.integers(0, 178, num_objects).tolist()), relations))
    pixels = rng.integers(0, 256, (num, resolution, resolution, 3), np.uint8)
    return PairSource(graphs, lambda i: pixels[i], "random")


class Naive:
    """A literal form of the paper's text: every step encodes images and words and packs its graphs on the host."""

    def __init__(self, setup: Setup, batch: int) -> None:
        self.setup, self.stage = setup, setup.stage(batch)
        self.optimizer = torch.optim.Adam(self.stage.parameters(), lr=self.stage.config.optim.pretrain_lr)
        source = setup.source
        pairs = [(source.load_image(i), source.graphs[i]) for i in range(len(source))]
        workers = 4 if setup.device.type == "cuda" else 0
        self.loader = DataLoader(pairs, batch, shuffle=True, drop_last=True, collate_fn=list, num_workers=workers)  # type: ignore[arg-type]
        self._batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        self._step = 0

    def loss(self, pairs: list[Any], step: int) -> Any:
        """Terms of a batch of (picture, graph)."""
        setup, stage = self.setup, self.stage
        images, _ = encode_images(np.stack([picture for picture, _ in pairs]), setup.foundation, setup.device, False)
        stage.cache = encoded([graph for _, graph in pairs], images, setup.foundation, setup.device)
        names = stage.conditioner.standardise(stage.cache.names)
        stage._frozen = (names, stage.conditioner.targets(names), stage.conditioner.centre_images(images))
        return stage(np.arange(len(pairs)), step)

    def first(self, num: int) -> float:
        """The auto-encoder's loss of the first pairs at step 0."""
        source = self.setup.source
        return float(self.loss([(source.load_image(i), source.graphs[i]) for i in range(num)], 0).losses["mae"])

    def step(self) -> None:
        """Load, encode, forward, backward, clip, update."""
        self.loss(next(self._batches), self._step).total.backward()
        nn.utils.clip_grad_norm_(self.stage.parameters(), self.stage.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._step += 1


class Trained:
    """The trainer's engine on the cached set."""

    def __init__(self, setup: Setup, batch: int, kind: type[EagerEngine | CapturedEngine]) -> None:
        stage = setup.stage(batch)
        self.engine = kind(stage, setup.device)
        self.order = SampleOrder(NUM_PAIRS, batch, 0, 0, 1)
        self._step = 0

    def first(self, num: int) -> float:
        """The auto-encoder's loss of the first pairs at step 0."""
        if isinstance(self.engine, CapturedEngine):  # compare the captured step, because it is the one that is timed
            return float(self.engine.update(np.arange(num)[None], 0, 0.0).losses["mae"])
        return float(self.engine.forward(np.arange(num), 0).losses["mae"])

    def step(self) -> None:
        """One update."""
        self.engine.update(self.order.at(self._step)[None], self._step)
        self._step += 1


def build(name: str, setup: Setup, batch: int) -> Naive | Trained:
    """Build the form `name`; sets the process-wide choice of kernels for it."""
    ops.use_kernels("triton" if name in ("kernels", "graphs") else "reference")
    if name == "naive":
        return Naive(setup, batch)
    return Trained(setup, batch, CapturedEngine if name == "graphs" else EagerEngine)


def launches(form: Naive | Trained, device: torch.device) -> tuple[int | None, int]:
    """(library, Triton) launches of one step.

    On a CPU only our `pack` runs, because all indices come from it: launches do not depend on the other values.
    """
    triton: list[str] = []

    def see(kernel: Any, *rest: Any) -> bool:
        triton.append(kernel.__name__)
        return device.type != "cuda" and kernel.__name__ != "pack_fwd_kernel"

    with intercept(see):
        if device.type == "cuda":
            total = measure.launches(form.step, device)
            return (None if total is None else total - len(triton)), len(triton)
        with OpCounter() as counter:
            form.step()
    return counter.count().launches, len(triton)


def _time(row: PretrainRow, form: Naive | Trained, device: torch.device, seconds: float, mean_triples: float) -> None:
    """Fill in the numbers of a step. The first steps allocate, compile and capture, and do not count."""
    assert row.floor_ms is not None
    for _ in range(3):
        form.step()
    times = measure.call_times(form.step, device, seconds)
    row.set_times(times)
    row.images_per_s = 1e3 * row.batch / times.p50
    row.triples_per_s = row.images_per_s * mean_triples
    row.over_floor = times.p50 / row.floor_ms


def rows(setup: Setup, names: list[str], batches: list[int], seconds: float, interpret: bool) -> Iterator[PretrainRow]:
    """Every form at every batch size, each checked against the naive one first."""
    facts, device = dataclasses.asdict(measure.machine(setup.device)), setup.device
    copy = measure.copy_bandwidth(device)
    for batch in batches:
        expected = build("naive", setup, batch).first(batch)
        mean_triples = float(setup.cache.graphs.sizes[:, 1].mean())
        for name in names:
            row = PretrainRow(name, setup.sizes, batch, **facts)
            on_cpu = device.type != "cuda" and name in ("kernels", "graphs")
            if on_cpu and (name == "graphs" or not interpret):
                row.status = "skipped: needs CUDA"
                yield row
                continue
            form = build(name, setup, batch)
            module = form.stage if isinstance(form, Naive) else form.engine.module
            row.parameters = sum(p.numel() for p in module.parameters())
            row.floor_ms = 1e3 * ADAM_BYTES * row.parameters / copy
            if on_cpu:
                row.status = "counted, not run"
            else:
                found = form.first(batch)
                if abs(found - expected) > TOLERANCE * abs(expected):
                    row.status = f"mismatch: first auto-encoder loss {found:.5f}, naive {expected:.5f}"
                    yield row
                    continue
                _time(row, form, device, seconds, mean_triples)
            row.library_launches, row.triton_launches = launches(form, device)
            yield row
    ops.use_kernels("auto")


def run(args: argparse.Namespace) -> int:
    """The command; returns exit status 1 after a mismatch."""
    device, interpret = device_of(args), os.environ.get("TRITON_INTERPRET") == "1"
    quiet_libraries(verbose=False)
    setup = Setup(args.quick or device.type != "cuda", device)
    print(f"{measure.heading(device)}; {setup.sizes} sizes, {NUM_PAIRS} pairs")
    output, seconds = Output(args.out, "pretrain_step.csv", PretrainRow), 0.2 if args.quick else 3.0
    for row in rows(setup, args.form or list(PRETRAIN), args.batch or list(BATCHES), seconds, interpret):
        output.add(row)
    return int(any(row.status.startswith("mismatch") for row in output.rows))
