"""Toy fine-tunings side by side, from one start, on the same samples; the command is `benchmarks/optimiser_loss.py`."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sgg_fast.config.optim import BLOCKWISE
from sgg_fast.recipes import recipe


def runs_of(seed: int, args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """The training losses of each step by optimiser."""
    from sgg_fast.train.engines.eager import EagerEngine
    from sgg_fast.train.trainer import Trainer

    settings = {"seed": seed, "batch_size": args.batch_size, "num_scenes": 64, "weights": args.weights}
    configs = {name: recipe("toy", **settings, optimizer=name) for name in args.optimizer}
    with tempfile.TemporaryDirectory() as out:
        stage = Trainer(next(iter(configs.values())), "finetune", Path(out)).engine.module
        engines = {}
        for name, config in configs.items():
            module = copy.deepcopy(stage)
            module.config = config
            flat = name in BLOCKWISE or args.weights != "master"
            engines[name] = EagerEngine(module, torch.device("cpu"), flat=flat)
        rng = np.random.default_rng(seed)
        for step in range(args.steps):
            ids = rng.choice(64, (1, args.batch_size), replace=False)
            yield {name: float(engine.update(ids, step).losses["loss"]) for name, engine in engines.items()}
