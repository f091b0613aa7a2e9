"""Measures the toy's step and pictures for `benchmarks.cpu`.

Fine-tuning: the trainer's engine with the toy's settings, all of its losses, graphs of the toy's largest size, and
cached latents and embeddings, against diffusers' recipe in fp32 (image and text encoders in the loop) with torch's
AdamW as the recipe calls it, and fused. Drawing: infer.py's pipeline against diffusers' with the same context, computed
beforehand; ours keeps it after the first picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import measure
from benchmarks.harness.output import Output, Row
from benchmarks.steps import finetune, infer_forms, sampling, train_forms
from benchmarks.steps.forms import Size
from sgg_fast.quiet import quiet_libraries
from sgg_fast.recipes import recipe
from sgg_fast.train.memory import blank

CPU = torch.device("cpu")
NUM_STEPS = 25
"""Of DDIM; the number that the shipped model draws by."""
LARGEST_GRAPH = 8, 8
"""Objects and relations of the toy's largest scenes."""
Form = tuple[Callable[[], object], str]
"""What to run, and the fault of its outputs, or ""."""


@dataclasses.dataclass
class CpuRow(Row):
    """Milliseconds of the processor's time for a step or a batch of pictures."""

    op: str
    mode: str
    size: str
    form: str
    of_diffusers: float | None = None
    """The median over that of diffusers' own form in the same run."""

    def line(self) -> str:
        if self.ms_p50 is None:
            return f"{self.op:12} {self.size:12} {self.form:24} {self.status}"
        ratio = "" if self.of_diffusers is None else f"{self.of_diffusers:6.2f} of diffusers'"
        return f"{self.op:12} {self.size:12} {self.form:24} {self.ms_p20:8.1f} {self.ms_p50:8.1f} ms {ratio}"


class OfTheToy(train_forms.Ours):
    """With graphs of the toy's largest size."""

    def _cache(self, resolution: int) -> Any:
        with mock.patch.object(blank, "LARGEST_GRAPH", LARGEST_GRAPH):
            return super()._cache(resolution)


def finetune_forms() -> dict[str, Form]:
    """The forms of a step, diffusers' own last."""
    config = recipe("toy", precision="fp32")
    size = Size(config.data.resolution, config.optim.batch_size)
    made: dict[str, train_forms.Form] = {"ours": OfTheToy(config, None, [size], CPU, finetune.NUM_LOSSES)}
    for optimiser in ("adamw-fused", "adamw"):
        made[f"diffusers {optimiser}"] = train_forms.Diffusers(
            config, optimiser, "sdpa", "", [size], CPU, finetune.NUM_LOSSES
        )
    for form in made.values():
        form.prepare(size)
    return {f"{name}, {size}": (form.step, finetune.mismatch(form, size)) for name, form in made.items()}


def draw_forms() -> dict[str, Form]:
    """The forms of a picture, diffusers' own last. Each has models of its own, because a form changes them."""
    found: dict[str, Form] = {}
    for name, form in (("ours", "eager"), ("diffusers", "diffusers")):
        pipeline = infer_forms.open_models("toy", CPU, torch.float32)
        size = Size(pipeline.config.resolution, 1)
        known = infer_forms.reference(pipeline, size, sampling.CHECK_STEPS)
        made = infer_forms.FORMS[form](pipeline, size)
        fault = sampling.mismatch(made, *known)
        found[f"{name}, {size}"] = (lambda made=made: made.draw(NUM_STEPS)), fault  # type: ignore[misc]
    return found


def rows(op: str, forms: dict[str, Form], rounds: int) -> list[CpuRow]:
    """A row of each form after `rounds` rounds; the last form is the one that others are compared with."""
    facts = dataclasses.asdict(measure.machine(CPU))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for call, _ in forms.values():
        call()
    for _ in range(rounds):
        for name, (call, _) in forms.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    found, times = [], {name: measure.times_of([1e3 * s for s in each]) for name, each in seconds.items()}
    last = times[list(forms)[-1]]
    for name, (_, fault) in forms.items():
        form, size = name.split(", ")
        row = CpuRow(op, "processor time", size, form, **facts)
        if fault:
            row.status = f"mismatch: {fault}"
        else:
            row.set_times(times[name])
            row.of_diffusers = times[name].p50 / last.p50
        found.append(row)
    return found


def run(args: argparse.Namespace) -> int:
    """The command; returns exit status 1 if a form did not match."""
    quiet_libraries(verbose=False)
    output = Output(args.out, "toy_cpu.csv", CpuRow)
    print(measure.heading(CPU))
    made = {"finetune": finetune_forms, "draw": draw_forms}
    for what in args.what:
        for row in rows(what, made[what](), args.rounds):
            output.add(row)
    return int(any(row.status != "ok" for row in output.rows))
