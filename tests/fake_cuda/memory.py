"""Peaks of Stable Diffusion v1.4's true sizes on the stand-in beside `--plan`: `python -m fake_cuda.memory FORM ..`.

torch's own caching allocator counts; convolutions and attention allocate what cuDNN's would. Not in it: cuDNN's real
workspaces, the CUDA context, numbers. Each form takes two captured or eager steps on random weights, as warm-up does.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgg_fast.recipes import recipe
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory.planner import Planner
from sgg_fast.train.rehearsal import engine_of

from . import device, run

GIB = 2**30
SHARE = 0.03
"""By which measurement and plan may differ."""
FORMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "default": ({}, None),
    "split": ({"weights": "split"}, None),
    "lean": ({"weights": "lean"}, None),
    "lean, checkpointed": ({"weights": "lean", "gradient_checkpointing": True}, None),
    "lean in backward": ({"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0}, None),
    "ds.json": ({}, "ds.json"),
}
FIELDS = ("form", "resolution", "batch", "planned_gib", "allocated_gib", "reserved_gib", "built_gib", "left_gib",
          "off_percent", "torch", "device")  # fmt: skip


def measure(name: str, resolution: int, batch: int) -> dict[str, Any]:
    """A row of one form."""
    changes, ds_path = FORMS[name]
    config = recipe("vg256", resolution=resolution, batch_size=batch, **changes)
    card = torch.device("cuda", 0)
    planner = Planner(config, plan_engine(config.optim, "finetune", card, ds_path), num_images=2 * batch, stored=False)
    planned = planner.plan(batch).peak
    del planner
    engine = engine_of("finetune", config, card, ds_path)
    built = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    ids = np.arange(batch)[None]
    for step in range(2):  # the first one warms up and captures: what a replay takes was allocated there
        engine.update(ids, step)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del engine
    gc.collect()
    left = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    sizes = [f"{size / GIB:.3f}" for size in (planned, allocated, reserved, built, left)]
    off = 100 * (allocated - planned) / planned
    return dict(
        zip(FIELDS, (name, resolution, batch, *sizes, f"{off:+.1f}", torch.__version__, "stand-in"), strict=True)
    )


def main() -> int:
    """Exit status 1 where a form is off the plan by more than SHARE, or the stand-in refused a call."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("forms", nargs="*", default=list(FORMS))
    parser.add_argument("--resolution", type=int, nargs="+", default=[512])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    run.prepare()
    rows = []
    for resolution in args.resolution:
        for name in args.forms:
            rows.append(measure(name, resolution, args.batch))
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
