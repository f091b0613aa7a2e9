"""Whole training steps on random weights: captured against eager, attention operators, memory against the plan."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from sgg_fast.config import Config
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding
from sgg_fast.nn.attention import XformersAttnProcessor, set_attention
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.base import Engine
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.memory.blank import blank_foundation
from sgg_fast.train.memory.planner import Planner
from sgg_fast.train.rehearsal import engine_of

COUNTS = Path(__file__).with_name("counts.json")
"""Kernels, copies and fills of a captured step at the toy's size, by torch and Triton."""
NUM_STEPS = 4
TOLERANCE = 2e-2
"""Relative tolerance of a loss in bf16; a captured step that read stale memory is off by far more."""
LAUNCHES = 0.05
"""Share by which launches may differ from the committed count: libraries choose other kernels on other chips."""
PLAN, SMALL = 0.03, 64 << 20
"""Share, plus bytes, by which the measured peak may exceed the plan at the toy's size."""


def settings(**changes: object) -> Config:
    """The toy's settings, at the sizes of a quick check."""
    return recipe("toy", batch_size=2, token_init="none", **changes)


def _losses(engine: Engine, num: int) -> list[float]:
    """Losses at a learning rate of 0, so every engine has the same weights."""
    ids = np.arange(engine.module.config.optim.batch_size)[None]
    return [float(engine.update(ids, step, 0.0).losses["loss"]) for step in range(num)]


def _close(a: list[float], b: list[float]) -> bool:
    values_a, values_b = torch.tensor(a), torch.tensor(b)
    return bool(values_a.isfinite().all()) and bool(((values_a - values_b).abs() <= TOLERANCE * values_b.abs()).all())


def check_capture(stage: str, device: torch.device) -> Iterator[Finding]:
    """Compare losses of captured steps with those of eager ones, and check the launches of a step."""
    name = f"captured {stage}"
    found: dict[str, list[float]] = {}
    launches = None
    for form, graphs in (("eager", False), ("captured", True)):
        engine = engine_of(stage, settings(cuda_graphs=graphs), device, None)
        found[form] = _losses(engine, NUM_STEPS)
        if graphs and not isinstance(engine, CapturedEngine):
            yield Finding(name, UNKNOWN, engine.execution, "capture")
            return
        if graphs and "failed" in engine.execution:
            yield Finding(name, FAILED, engine.execution, "capture")
            return
        if graphs:
            launches = launches_of(engine)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    if not _close(found["captured"], found["eager"]):
        pairs = ", ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(found["captured"], found["eager"], strict=True))
        yield Finding(name, FAILED, f"losses captured/eager: {pairs}", "capture")
        return
    yield Finding(name, OK, f"{NUM_STEPS} losses as eagerly", "capture")
    yield judge_launches(stage, launches)


def launches_of(engine: Engine) -> int | None:
    """Kernels, copies and fills of one step by torch's profiler; None if it records none."""
    ids = np.arange(engine.module.config.optim.batch_size)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        engine.update(ids, NUM_STEPS, 0.0)
        torch.cuda.synchronize()
    events = [e for e in profiled.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) or None


def versions() -> str:
    """The versions that a committed count belongs to."""
    return f"torch {'.'.join(torch.__version__.split('.')[:2])}, triton {'.'.join(version('triton').split('.')[:2])}"


def judge_launches(stage: str, launches: int | None) -> Finding:
    """Compare with the committed count."""
    name, committed = f"launches of {stage}", json.loads(COUNTS.read_text()).get(versions(), {}).get(stage)
    if launches is None:
        return Finding(name, UNKNOWN, "torch's profiler sees no kernels here")
    if committed is None:
        return Finding(name, UNKNOWN, f"{launches}; no count is committed for {versions()}")
    off = abs(launches - committed) > LAUNCHES * committed
    return Finding(name, FAILED if off else OK, f"{launches}, committed {committed}")


def check_attention(device: torch.device) -> Finding:
    """Find the operators that attend in a UNet of the toy, called once in training."""
    unet = blank_foundation(settings().model).unet.to(device).requires_grad_(True).train()
    chosen = set_attention(unet, "auto", device)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    z, context = torch.randn(1, 4, side, side, device=device), torch.randn(1, 80, width, device=device)
    mask = torch.ones(1, 80, dtype=torch.bool, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        unet(z, 0, context, encoder_attention_mask=mask).sample.float().sum().backward()
    processor = next(iter(unet.attn_processors.values()))
    if isinstance(processor, XformersAttnProcessor):
        ran = sorted({operators.forward.NAME for operators in processor.ran.values()})
        return Finding("attention", OK, f"xformers: {', '.join(ran)}", "attention")
    assert isinstance(processor, AttnProcessor2_0)
    return Finding("attention", OK, f"{chosen}, by torch", "attention")


def check_memory(device: torch.device) -> Finding:
    """Compare the peak of a captured fine-tuning step with the plan."""
    config = settings()
    batch = config.optim.batch_size
    plan = Planner(config, None, device.type, num_images=2 * batch, stored=False).plan(batch)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    engine = engine_of("finetune", config, device, None)
    _losses(engine, 2)
    peak = torch.cuda.max_memory_allocated(device) - before
    measured = f"peak {peak / 2**20:.0f} MiB, planned {plan.peak / 2**20:.0f} MiB at the toy's size"
    return Finding("memory", FAILED if peak > (1 + PLAN) * plan.peak + SMALL else OK, measured)
