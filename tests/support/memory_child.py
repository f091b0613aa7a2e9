"""A process that takes real training steps and prints by how many bytes its resident memory rose at the highest.

    python memory_child.py MODEL_FOLDER DS_JSON|- FIELD=VALUE...

Models of the folder's sizes with random weights; see `test_planner.py`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

QUIET_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # fixed, so that what is freed goes back
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}

CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**CLIP, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def write_sizes(folder: Path, channels: tuple[int, ...], context: int = 256) -> Path:
    """Configurations alone: SD v1.4's UNet with other widths beside small frozen models."""
    from sgg_fast.train.memory.sizes import SD14

    text = {
        **CLIP,
        "hidden_size": context,
        "projection_dim": context,
        "vocab_size": 1000,
        "model_type": "clip_text_model",
    }
    vision = {**CLIP, "image_size": 32, "patch_size": 16}
    parts: dict[str, dict[str, Any]] = {
        "unet": {"_class_name": "UNet2DConditionModel", **SD14.unet, "block_out_channels": channels,
                 "cross_attention_dim": context},
        "vae": {"_class_name": "AutoencoderKL", **SD14.vae, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8},
        "text_encoder": text,
        "graph_clip": {"model_type": "clip", "projection_dim": 128, "text_config": TEXT,
                       "vision_config": vision},
    }  # fmt: skip
    for name, sizes in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(sizes))
    return folder


def rise(folder: Path, settings: dict[str, Any], ds_path: str | None = None) -> int:
    """Run this file in a fresh process and read what it prints."""
    words = [sys.executable, __file__, str(folder), ds_path or "-", json.dumps(settings)]
    done = subprocess.run(words, env={**os.environ, **QUIET_MALLOC}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _train(settings: dict[str, Any], ds_path: str | None, num_steps: int) -> None:
    """Steps of the real engine on models of random weights."""
    import numpy as np
    import torch

    from sgg_fast.recipes import recipe
    from sgg_fast.train.assemble import assemble
    from sgg_fast.train.engines.choose import build_engine, plan_engine
    from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation

    config, device = recipe("vg128", **settings), torch.device("cpu")
    foundation = blank_foundation(config.model)
    ds = plan_engine(config.optim, "finetune", device, ds_path)
    parts = foundation, blank_conditioner(config.model, foundation), blank_cache(config, foundation, 8)
    engine = build_engine(assemble(config, "finetune", *parts, device, ds), device, ds)
    shape = config.optim.accumulation_steps, config.optim.batch_size
    for step in range(num_steps):
        engine.update(np.arange(shape[0] * shape[1]).reshape(shape) % 8, step)


def main(folder: str, ds_path: str, settings: str) -> None:
    """The first, small run loads every library and allocates what a process needs once."""
    given, ds = json.loads(settings), None if ds_path == "-" else ds_path
    small = {"recipe": "toy", "resolution": 64, "width": 32, "num_layers": 1, "token_init": "none"}
    _train({**given, **small, "model": ""}, ds, 1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    _train({**given, "model": folder}, ds, 2)
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
