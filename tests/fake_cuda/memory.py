"""Peaks of Stable Diffusion's true sizes (v1.4, SDXL) on the stand-in beside `--plan`: `-m fake_cuda.memory FORM ..`.

A row is a run of `Trainer`: data and models, set-up, steps, a sample sheet, a checkpoint (not DeepSpeed's). torch's
caching allocator counts. Convolutions and attention allocate what cuDNN's would. Not in a row: cuDNN's real workspaces,
the CUDA context, numbers. Weights are blank, the graphs have the largest size that published sets keep.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput

from sgg_fast.config import Config, ModelConfig
from sgg_fast.data.sources import PairSource
from sgg_fast.nn.foundation import Foundation
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_tokenizer
from sgg_fast.train import trainer as training
from sgg_fast.train.engines import state as engine_state
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory.blank import blank_foundation, largest_graph
from sgg_fast.train.memory.plan import GIB, MemoryPlan
from sgg_fast.train.memory.planner import Planner
from sgg_fast.train.outputs import draw_sheet

from . import blocks, device, run

ROWS = Path(__file__).with_suffix(".csv")
SHARE = 0.03
"""Allowed difference between measurement and plan, as a share of the plan."""
NUM_IMAGES, NUM_STEPS = 8, 3
SETTINGS: dict[str, Any] = {"data": "toy", "num_samples": 4, "sheet_steps": 1}
_SMALLEST: dict[str, Any] = {"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0,
                             "gradient_checkpointing": True, "sheet_device": "cpu"}  # fmt: skip
TRAINING_FORMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "master": ({"weights": "master"}, None),
    "split": ({"weights": "split"}, None),
    "lean": ({"weights": "lean"}, None),
    "lean, checkpointed": ({"weights": "lean", "gradient_checkpointing": True}, None),
    "lean in backward": ({"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0}, None),
    "lean in backward, 4-bit state": (_SMALLEST | {"optimizer": "adam4bit"}, None),
    "lean in backward, factored state": (_SMALLEST | {"optimizer": "adafactor"}, None),
    "ds.json": ({}, str(Path(__file__).parents[2] / "ds.json")),
}
"""Form -> its settings and its DeepSpeed configuration."""
SDXL_FORMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "SDXL": ({"optimizer_in_backward": False, "max_grad_norm": 1.0}, None),
    "SDXL in backward": ({}, None),
    "SDXL in backward, 4-bit state": ({"optimizer": "adam4bit"}, None),
    "SDXL in backward, factored state": ({"optimizer": "adafactor"}, None),
    "SDXL in backward, whole sheets": ({"sheet_device": "auto"}, None),
}
"""Form -> what it changes of laion1024-sdxl (bf16 weights, in backward, checkpointed, sheets decoded by the CPU); at
--resolution 1024, --batch 1 or 2. Not measured yet."""
FORMS = TRAINING_FORMS | SDXL_FORMS
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


def _models(model: ModelConfig) -> Foundation:
    """Models of true size in host memory without contents, with tokenizers that map any word to some tokens."""
    with torch.device("meta"):
        made = blank_foundation(model)
    for part in (made.unet, made.vae, *made.text_encoders, made.clip):
        part.to_empty(device="cpu")
        for buffer in part.buffers():  # indices of positions, which a CPU reads
            buffer.zero_()
    made.scheduler = type(made.scheduler).from_config(made.scheduler.config)  # its tables have contents
    made.tokenizer = made.clip_tokenizer = toy_tokenizer()
    made.tokenizer_2 = made.tokenizer if made.text_encoder_2 else None
    return made


def _pairs(data: Any, *_: Any) -> PairSource:
    blank = np.zeros((data.resolution, data.resolution, 3), np.uint8)
    return PairSource([largest_graph()] * NUM_IMAGES, lambda i: blank, "blank")


@contextlib.contextmanager
def _decoded_at_once() -> Iterator[None]:
    """Context in which blank latents are finite, and a VAE in CPU memory gives blank pictures: its minutes of
    arithmetic take none of the device."""
    decode, decode_latents = SceneGraphToImagePipeline.decode, AutoencoderKL._decode

    def finite(pipeline: Any, latents: torch.Tensor, *rest: Any) -> Any:
        return decode(pipeline, latents.nan_to_num(0, 0, 0), *rest)

    def blank(vae: AutoencoderKL, z: torch.Tensor, return_dict: bool = True) -> Any:
        if z.device.type != "cpu":
            return decode_latents(vae, z, return_dict)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return DecoderOutput(torch.zeros(len(z), 3, *(factor * side for side in z.shape[2:])))

    with (
        mock.patch.object(AutoencoderKL, "_decode", blank),
        mock.patch.object(SceneGraphToImagePipeline, "decode", finite),
    ):
        yield


def settings_of(name: str, resolution: int, batch: int) -> tuple[Config, str | None]:
    """The settings of a form's row and its DeepSpeed configuration."""
    changes, ds_path = FORMS[name]
    base = "laion1024-sdxl" if name in SDXL_FORMS else "vg256"
    return recipe(base, **{**SETTINGS, "resolution": resolution, "batch_size": batch, **changes}), ds_path


def measure(name: str, resolution: int, batch: int, history: bool = False) -> dict[str, Any]:
    """A row of one form. history: print what was alive at the peak."""
    config, ds_path = settings_of(name, resolution, batch)
    peaks = Peaks()
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
        plan = planned(name, resolution, batch)
        print("\n".join(plan.lines()), flush=True)
        with peaks.phase("step"):
            for step in range(NUM_STEPS):
                trainer.engine.update(np.arange(batch)[None], step)
        with peaks.phase("sheet"), _decoded_at_once():
            if config.run.sample_every:
                draw_sheet(trainer._pipeline(with_text=False), config.run, trainer.source, trainer.device)
        with peaks.phase("checkpoint"), mock.patch.object(engine_state, "save_file"), mock.patch("torch.save"):
            if ds_path is None:
                trainer.engine.save(out)
        del trainer
    gc.collect()
    left = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    allocated, reserved = (max(sizes) for sizes in zip(*peaks.of.values(), strict=True))
    sizes = {
        "allocated_gib": allocated,
        "reserved_gib": reserved,
        **{f"{phase}_gib": size for phase, (size, _) in peaks.of.items()},
        "left_gib": left,
    }
    row = {"form": name, "resolution": resolution, "batch": batch, "torch": torch.__version__, "device": "stand-in"}
    return beside(row | {field: f"{size / GIB:.3f}" for field, size in sizes.items()}, plan)


def planned(name: str, resolution: int, batch: int) -> MemoryPlan:
    """The plan of a row; it needs no device."""
    config, ds_path = settings_of(name, resolution, batch)
    ds_config = plan_engine(config.optim, "finetune", torch.device("cuda"), ds_path)
    return Planner(config, ds_config, "cuda", num_images=NUM_IMAGES, stored=False).plan(batch)


def beside(row: dict[str, Any], plan: MemoryPlan) -> dict[str, Any]:
    """A measured row with the columns of a plan."""
    row = row | {"planned_gib": f"{plan.peak / GIB:.3f}", "planned_reserved_gib": f"{plan.reserved / GIB:.3f}",
                 "planned_when": plan.when}  # fmt: skip
    for of, measured, plan_of in (("off_percent", "allocated_gib", "planned_gib"),
                                  ("off_reserved_percent", "reserved_gib", "planned_reserved_gib")):  # fmt: skip
        row[of] = f"{100 * (float(row[measured]) / float(row[plan_of]) - 1):+.1f}"
    return {field: row[field] for field in FIELDS}


def read_rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """The committed rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, Any]], path: Path = ROWS) -> None:
    """Write rows in the order of the forms, the large pictures first."""
    forms = list(FORMS)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (-int(row["resolution"]), forms.index(row["form"]))))


def is_off(row: dict[str, Any]) -> bool:
    """Whether a row is further from its plan than `SHARE`."""
    return max(abs(float(row[name])) for name in ("off_percent", "off_reserved_percent")) > 100 * SHARE


def main() -> int:
    """Exit status 1 where a form is off its plan, or the stand-in refused a call."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("forms", nargs="*", default=list(TRAINING_FORMS))
    parser.add_argument("--resolution", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--update", action="store_true", help=f"write the rows into {ROWS.name}")
    parser.add_argument("--replan", action="store_true", help=f"plan the rows of {ROWS.name} again; measure nothing")
    parser.add_argument("--history", action="store_true", help="print what was alive at the peak")
    args = parser.parse_args()
    if args.replan:
        rows = [beside(r, planned(r["form"], int(r["resolution"]), int(r["batch"]))) for r in read_rows()]
        write_rows(rows)
        return int(any(map(is_off, rows)))
    wanted = [(name, resolution) for resolution in args.resolution for name in args.forms]
    if len(wanted) > 1:  # a process each: DeepSpeed keeps its engine
        words = [f"--batch={args.batch}", *(["--update"] if args.update else [])]
        commands = [[name, f"--resolution={resolution}", *words] for name, resolution in wanted]
        return max(subprocess.run([sys.executable, "-m", "fake_cuda.memory", *one]).returncode for one in commands)
    run.prepare()
    ((name, resolution),) = wanted
    row = measure(name, resolution, args.batch, args.history)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.update:
        key = (row["form"], str(resolution), str(args.batch))
        others = [r for r in read_rows() if (r["form"], r["resolution"], r["batch"]) != key]
        write_rows([*others, row])
    for line in device.complaints():
        print(f"refused: {line}", file=sys.stderr)
    return int(bool(device.complaints()) or is_off(row))


if __name__ == "__main__":
    sys.exit(main())
