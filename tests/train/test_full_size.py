"""A training step of Stable Diffusion v1.4's own architecture, 859.5 M parameters, on a CPU machine with 24 GiB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from support import DS_JSON, ROOT
from support.sd_folder import write_clip, write_pairs, write_sd
from support.tiny_runs import lines, rows

from sgg_fast.train.engines.deepspeed import LAUNCHER

GIB = {"deepspeed": 11, "lean": 7, "in-backward": 7}
"""Most resident memory of each way."""

WAYS = {
    "deepspeed": ["--deepspeed", DS_JSON, "--precision", "bf16"],
    "lean": ["--weights", "lean"],
    "in-backward": ["--weights", "lean", "--optimizer-in-backward", "--max-grad-norm", "0"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    write_sd(folder / "sd", full_size=True)
    write_clip(folder / "clip")
    write_pairs(folder / "pairs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_a_step_of_the_full_size_unet_at_batch_2_and_256_pixels(models, tmp_path, way):
    """bf16 and gradient checkpointing, so that it fits; what is recorded is what the log says."""
    argv = [sys.executable, "train.py", "--stage", "finetune", "--recipe", "vg256", "--steps", "1", *WAYS[way],
            "--gradient-checkpointing", "--model", models / "sd", "--clip", models / "clip", "--data", models / "pairs",
            "--out", tmp_path, "--sample-every", "0", "--log-every", "1"]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    done = subprocess.run([str(word) for word in argv], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = lines(tmp_path / "finetune")[0]
    step = next(line for line in lines(tmp_path / "finetune") if "event" not in line)
    print(f"{way}: {step['peak_memory_gib']:.1f} GiB resident, {2 / step['images_per_s']:.0f} s a step, {step}")
    assert start["parameters"] > 859_520_964 and start["settings"]["batch_size"] == 2
    assert 0 < rows(tmp_path / "finetune")[1]["diff"] < 10
    assert step["peak_memory_gib"] < GIB[way]
    name = "conv_in.weight"
    before, after = (
        safe_open(unet / "diffusion_pytorch_model.safetensors", "pt").get_tensor(name)
        for unet in (models / "sd" / "unet", tmp_path / "finetune" / "pipeline" / "unet")
    )
    assert after.isfinite().all() and not after.float().equal(before.float())
