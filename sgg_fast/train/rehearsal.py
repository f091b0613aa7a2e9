"""Takes real steps of training and sampling on random weights and graphs: the warm-up's, and the doctor's checks."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sgg_fast.config import Config
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.foundation import Foundation
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines.base import Engine
from sgg_fast.train.engines.choose import build_engine, plan_engine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.outputs import make_pipeline

NUM_STEPS = 2
"""Training steps: the first one allocates, the second one reuses."""
BATCHES = (1, 8)
"""Numbers of pictures drawn at a time: one, and infer.py's --batch-size."""


def cache_folder() -> Path:
    """Folder of Triton's compiled kernels."""
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    return Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))


def num_compiled(folder: Path) -> int:
    """Number of kernels in the folder."""
    return sum(1 for _ in folder.rglob("*.cubin"))


def _models(config: Config, device: torch.device) -> Foundation:
    """Models with random weights, and tokenizers that map any word to some tokens."""
    from sgg_fast.toy.models import toy_tokenizer

    torch.manual_seed(config.run.seed)
    with device:
        foundation = blank_foundation(config.model)
    return dataclasses.replace(foundation, tokenizer=toy_tokenizer(), clip_tokenizer=toy_tokenizer())


def engine_of(stage: str, config: Config, device: torch.device, ds_path: str | None) -> Engine:
    """The engine of `Trainer`, on random weights and data. Models begin on the host, as there: it casts them."""
    foundation = _models(config, torch.device("cpu"))
    cache = blank_cache(config, foundation, 2 * config.optim.batch_size)
    ds_config = plan_engine(config.optim, stage, device, ds_path)
    conditioner = blank_conditioner(config.model, foundation)
    module = assemble(config, stage, foundation, conditioner, cache, device, ds_config)
    return build_engine(module, device, ds_config)


def _train(stage: str, config: Config, device: torch.device, ds_path: str | None) -> None:
    """Take steps of a stage as `Trainer` does."""
    engine = engine_of(stage, config, device, ds_path)
    micro = config.optim.accumulation_steps if stage == "finetune" else 1
    for step in range(NUM_STEPS):
        engine.update(np.tile(np.arange(config.optim.batch_size), (micro, 1)), step)


def _draw(config: Config, device: torch.device) -> None:
    """Take one step of sampling as infer.py does."""
    foundation = _models(config, device)
    with device:
        conditioner = blank_conditioner(config.model, foundation)
    pipeline = make_pipeline(config, foundation, conditioner)
    if device.type == "cuda":
        pipeline.unet.to(torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    for batch in BATCHES:
        pipeline([SceneGraph(("sheep", "grass"), ((0, "on", 1),))] * batch, num_inference_steps=1, output_type="pt")


def warm_up(config: Config, device: torch.device, ds_path: str | None, say: Callable[[str], None]) -> None:
    """Run pre-training, fine-tuning and sampling with these settings; one line for each: kernels compiled, seconds."""
    parts: dict[str, Callable[[], None]] = {
        "pretrain": lambda: _train("pretrain", config, device, None),
        "finetune": lambda: _train("finetune", config, device, ds_path),
        "infer": lambda: _draw(config, device),
    }
    folder = cache_folder()
    for name, part in parts.items():
        before, start = num_compiled(folder), time.perf_counter()
        part()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        say(f"{name}: {num_compiled(folder) - before} kernels compiled, {time.perf_counter() - start:.0f} s")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    say(f"{num_compiled(folder)} kernels in {folder}")
