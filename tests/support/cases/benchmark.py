"""What tests of the benchmarks share: small cases and sizes, and a stand-in for torch.cuda under their timing."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import measure
from benchmarks.ops import cases, timing
from benchmarks.ops.cases import Case
from benchmarks.quality.plan import SYSTEMS
from benchmarks.quality.plan import Sizes as QualitySizes
from sgg_fast.train.memory.sizes import Sizes

TINY = QualitySizes(batch_size=2, pretrain_steps=2, finetune_steps=2, num_scenes=16, num_graphs=2, draw_steps=1)
"""Sizes of a comparison's cells."""
SYSTEM = {system.name: system for system in SYSTEMS}
SMALL_UNET = Sizes(
    "Small",
    {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    },
    {"block_out_channels": (16, 16, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
     "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "norm_num_groups": 8},
    ({"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},),
    resolution=64,
)  # fmt: skip
"""Stable Diffusion with one block in place of four."""
FLOAT_OPS = [op for op in cases.OPS if op != "pack"]


def small_case(op: str, mode: str = "fwd_bwd", size: str = "vg2", dtype: str = "fp32") -> Case:
    """A case of the op in a size that it has, 16 columns wide."""
    size = size if op in cases.GRAPH_OPS else "tiny"
    if op in cases.FORWARD_ONLY:
        mode, dtype = "fwd", cases.FORWARD_ONLY[op]
    return Case(op, mode, size, dtype, width=16)


def on_cpu(**changes: object) -> timing.BenchSettings:
    """Settings of a measurement on a CPU that takes no time."""
    settings = {"device": torch.device("cpu"), "backends": ("eager",), "seconds": 0.0, "compile_seconds": 0.0}
    return timing.BenchSettings(**{**settings, **changes})


class _Event:
    """A stand-in for a CUDA event, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stand_in_cuda(monkeypatch):
    """Just enough of torch.cuda on the host to run the logic of the CUDA path; its times mean nothing."""
    stand_ins = {
        "Event": _Event,
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 160,
        "get_device_name": lambda device: "stand-in",
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure, "_flush_buffer", lambda device: torch.zeros(8))
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "launches", lambda run, device: 7)
    measure.machine.cache_clear()
    yield
    measure.machine.cache_clear()
