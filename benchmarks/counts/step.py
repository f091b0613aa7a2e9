"""Counts the launches of a whole fine-tuning step at Stable Diffusion v1's size, on the GPU and by the host.

    python -m benchmarks.counts.step

These are counts, not measurements: the captured engine's step runs on tensors without memory, as `unet.py` runs the
UNet. Eagerly the host launches each of these kernels. A captured step needs one graph launch and two copies from the
host.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts.kernels import triton_everywhere
from benchmarks.counts.unet import UNetCounter, cuda_norms, make_channels_last, opaque_attention
from benchmarks.steps import train_forms
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import Config
from sgg_fast.ops.adam import num_chunks
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.planner import _recast

HOST_CALLS = 3
"""Host calls of a captured step: copying the table, launching the graph, copying back the applied flag."""


@dataclasses.dataclass(frozen=True)
class StepCount:
    """Launches of a step with one micro-batch."""

    unet_and_losses: int
    optimiser: int
    """Launches of the optimiser after backward; updates in backward take four a weight."""

    @property
    def total(self) -> int:
        """Kernels in the graph, or launches without it."""
        return self.unet_and_losses + self.optimiser


def engine_of(config: Config) -> CapturedEngine:
    """The engine of a GPU, on tensors without memory. Call it under a `FakeTensorMode`."""
    config = config.replace(attention="sdpa", cross_attention="auto", fuse_unet="on")
    models = blank_foundation(config.model)
    if config.optim.bf16_weights:
        _recast(models.unet, torch.bfloat16)
    make_channels_last(models.unet)
    parts = models, blank_conditioner(config.model, models), blank_cache(config, models, 1)
    stage = assemble(config, "finetune", *parts, torch.device("cpu"))
    for module in (stage, models.unet):  # already on the device; tensors without memory cannot be moved
        module.to = module.bfloat16 = lambda *args, module=module, **kwargs: module
    return CapturedEngine(stage, torch.device("cpu"))


def count(config: Config) -> StepCount:
    """Count the step that these settings run on a GPU, with the fused UNet."""
    with contextlib.ExitStack() as stack:
        for context in (FakeTensorMode(allow_non_fake_inputs=True), opaque_attention(), triton_everywhere()):
            stack.enter_context(context)
        if not config.optim.bf16_weights:  # bf16 weights run without autocast
            stack.enter_context(cuda_norms())
        engine = engine_of(config)
        bucket = engine.buckets.of(np.zeros((1, config.optim.batch_size), np.int64))
        numels = [[p.numel() for p in group["params"]] for group in engine.optimizer.param_groups]
        addresses = torch.zeros(sum(num_chunks(group, "triton") for group in numels), 3, dtype=torch.int64)
        counters: list[Any] = []
        for function in engine.parts(bucket, addresses)[0]:
            counters.append(UNetCounter())
            with counters[-1]:
                function()
    add, apply = (counter.total.launches for counter in counters)
    return StepCount(add, apply)


@command("benchmarks.counts.step")
def main(argv: list[str] | None) -> None:
    """Print every form of the weights."""
    OneLineParser(prog="python -m benchmarks.counts.step", description=__doc__.split("\n\n")[0]).parse_args(argv)
    base = train_forms.settings(quick=False)
    side = base.data.resolution
    print(f"{side} x {side}, batch {base.optim.batch_size}, fused UNet, bf16 compute", flush=True)
    for name, changes in (("fp32 master weights", {}), ("split", {"weights": "split"}), ("lean", {"weights": "lean"})):
        found = count(base.replace(**changes))
        print(f"{name:20} by the host: {found.total:,} ({found.optimiser} of them the optimiser's), "
              f"{HOST_CALLS} where these are captured")  # fmt: skip
