"""Compiles a recipe's kernels before its first step: `python -m sgg_fast.train.warmup --recipe vg256`.

It takes the settings of train.py. On random weights and graphs it takes real steps of both stages and draws a picture,
so it needs what they need, memory included. Triton keeps the compiled kernels in its cache on disk, where the real run
finds them. Triton compiles different kernels for a size that is a multiple of 16 and for one that is not, so batches
without a fixed shape (`--no-cuda-graphs`) may compile a few more kernels later.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sgg_fast import env
from sgg_fast.commands import command
from sgg_fast.config import Config, add_flags
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.foundation import Foundation
from sgg_fast.quiet import quiet_libraries
from sgg_fast.recipes import RECIPES, recipe
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
        pipeline([SceneGraph(("sheep", "grass"), ((0, "on", 1),))] * batch, num_inference_steps=1)


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings of a recipe, as train.py takes them."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m sgg_fast.train.warmup", description=about, allow_abbrev=False)
    parser.add_argument("--recipe", default="toy", help=f"named settings: {', '.join(RECIPES)} (toy)")
    parser.add_argument("--deepspeed", metavar="DS_JSON", help="DeepSpeed configuration of the fine-tuning")
    add_flags(parser.add_argument_group("settings of the recipe"))
    return parser.parse_args(argv)


@command("warmup", interrupted="what was compiled is kept", refused=(ValueError, OSError, torch.OutOfMemoryError))
def main(argv: list[str] | None) -> None:
    """Exit code: 0 done; 2 for settings or a machine that cannot do it (one line on stderr), 130 interrupted."""
    args = vars(parse(argv))
    name, ds_path = args.pop("recipe"), args.pop("deepspeed")
    config = recipe(name, **args)
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here: kernels are compiled on the machine that runs them")
    quiet_libraries()
    warm_up(config, env.device(), ds_path, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
