"""Peaks of Stable Diffusion v1.4's true sizes on the stand-in beside `--plan`: `python -m fake_cuda.memory FORM ..`.

A row is a run of `Trainer`: data and models, set-up, steps, a sample sheet, a checkpoint, each with its own peak.
torch's caching allocator counts. Convolutions and attention allocate what cuDNN's would. Not in a row: cuDNN's real
workspaces, the CUDA context, numbers. Weights are blank, the graphs have the largest size that published sets keep.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from sgg_fast.data.sources import PairSource
from sgg_fast.nn.foundation import Foundation
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_tokenizer
from sgg_fast.train import trainer as training
from sgg_fast.train.engines import state as engine_state
from sgg_fast.train.memory.blank import blank_foundation, largest_graph
from sgg_fast.train.memory.planner import GIB, Planner
from sgg_fast.train.outputs import draw_sheet

from . import blocks, device, run

SHARE = 0.03
"""Allowed difference between measurement and plan, as a share of the plan."""
NUM_IMAGES, NUM_STEPS = 8, 3
SETTINGS: dict[str, Any] = {"data": "toy", "num_samples": 4, "sheet_steps": 1}
TRAINING_FORMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "default": ({}, None),
    "split": ({"weights": "split"}, None),
    "lean": ({"weights": "lean"}, None),
    "lean, checkpointed": ({"weights": "lean", "gradient_checkpointing": True}, None),
    "lean in backward": ({"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0}, None),
    "ds.json": ({}, "ds.json"),
}
"""Form of DESIGN 4's memory row -> its settings and its DeepSpeed configuration."""
FIELDS = ("form", "resolution", "batch", "planned_gib", "allocated_gib", "off_percent", "planned_reserved_gib",
          "reserved_gib", "off_reserved_percent", "planned_when", "cache_gib", "build_gib", "step_gib", "sheet_gib",
          "checkpoint_gib", "left_gib", "torch", "device")  # fmt: skip


class Peaks:
    """Bytes at the highest point of each phase of a run: phase -> (allocated, reserved)."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context of a phase."""
        torch.cuda.reset_peak_memory_stats()
        yield
        self.of[name] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _models(*_: Any) -> Foundation:
    """Models of true size in host memory without contents, with tokenizers that map any word to some tokens."""
    with torch.device("meta"):
        made = blank_foundation(recipe("vg256").model)
    for part in (made.unet, made.vae, made.text_encoder, made.clip):
        part.to_empty(device="cpu")
    made.scheduler = type(made.scheduler).from_config(made.scheduler.config)  # its tables have contents
    made.tokenizer = made.clip_tokenizer = toy_tokenizer()
    return made


def _pairs(data: Any, *_: Any) -> PairSource:
    blank = np.zeros((data.resolution, data.resolution, 3), np.uint8)
    return PairSource([largest_graph()] * NUM_IMAGES, lambda i: blank, "blank")


def measure(name: str, resolution: int, batch: int, history: bool = False) -> dict[str, Any]:
    """A row of one form. history: print what was alive at the peak."""
    changes, ds_path = TRAINING_FORMS[name]
    config = recipe("vg256", resolution=resolution, batch_size=batch, **SETTINGS, **changes)
    peaks, card = Peaks(), torch.device("cuda", 0)
    gc.collect()
    torch.cuda.empty_cache()
    built = training.Trainer._engine

    def engine_of(self: Any) -> Any:
        peaks.of["cache"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        with peaks.phase("build"):
            return built(self)

    with contextlib.ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for where, what, put in ((training, "preflight", mock.DEFAULT), (training, "open_foundation", _models),
                                 (training, "open_source", _pairs),
                                 (training.Trainer, "_engine", engine_of)):  # fmt: skip
            stack.enter_context(mock.patch.object(where, what, put))
        torch.cuda.reset_peak_memory_stats()
        if history:
            stack.enter_context(blocks.watched())
        trainer = training.Trainer(config, "finetune", out, ds_path)
        planner = Planner(config, trainer.ds_config, "cuda", num_images=NUM_IMAGES, stored=False)
        plan = planner.plan(batch)
        print("\n".join(plan.lines()), flush=True)
        del planner
        with peaks.phase("step"):
            for step in range(NUM_STEPS):
                trainer.engine.update(np.arange(batch)[None], step)
        with peaks.phase("sheet"):
            draw_sheet(trainer._pipeline(with_text=False), config.run, trainer.source, card)
        with peaks.phase("checkpoint"), mock.patch.object(engine_state, "save_file"), mock.patch("torch.save"):
            if ds_path is None:
                trainer.engine.save(out)
        del trainer
    gc.collect()
    left = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    allocated, reserved = (max(sizes) for sizes in zip(*peaks.of.values(), strict=True))
    values = {
        "form": name,
        "resolution": resolution,
        "batch": batch,
        "planned_gib": plan.peak,
        "allocated_gib": allocated,
        "off_percent": f"{100 * (allocated - plan.peak) / plan.peak:+.1f}",
        "reserved_gib": reserved,
        "planned_when": plan.when,
        **{f"{phase}_gib": sizes[0] for phase, sizes in peaks.of.items()},
        "left_gib": left,
        "torch": torch.__version__,
        "device": f"stand-in, {card}",
    }
    print({phase: tuple(f"{s / GIB:.3f}" for s in sizes) for phase, sizes in peaks.of.items()}, flush=True)
    return {name: f"{v / GIB:.3f}" if name.endswith("_gib") else v for name, v in values.items()}


def main() -> int:
    """Exit status 1 where a form is off the plan by more than SHARE, or the stand-in refused a call."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("forms", nargs="*", default=list(TRAINING_FORMS))
    parser.add_argument("--resolution", type=int, nargs="+", default=[512])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--history", action="store_true", help="print what was alive at the peak")
    args = parser.parse_args()
    run.prepare()
    rows = []
    for resolution in args.resolution:
        for name in args.forms:
            rows.append(measure(name, resolution, args.batch, args.history))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        new = not args.csv.is_file()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
    for line in device.complaints():
        print(f"refused: {line}", file=sys.stderr)
    return int(bool(device.complaints()) or any(abs(float(row["off_percent"])) > 100 * SHARE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
