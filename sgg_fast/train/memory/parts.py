"""Memory arithmetic: what an engine keeps and what its update needs temporarily, from the sizes of its groups.

Letters: N trained weights, W processes. Sources: bitsandbytes' states (one byte per element and one float per 256
elements, twice), `adam_state.py`, and DeepSpeed 0.19's `stage_1_and_2.py` and `stage3.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from sgg_fast.config import OptimConfig
from sgg_fast.ops.adam import BLOCKS, num_chunks
from sgg_fast.train.engines.all_reduce import BUCKET_BYTES, IN_FLIGHT
from sgg_fast.train.engines.base import resolve_precision
from sgg_fast.train.engines.ds_config import GROUP_ELEMENTS
from sgg_fast.train.memory.allocator import rounded
from sgg_fast.train.optim.groups import STATES, is_flat

SCALE_BYTES = 4
"""Of a block of quantised state."""

CPU_UPDATE = {8: 20, 32: 12}
"""Temporary bytes per element of bitsandbytes' CPU update, by the width of its state; on CUDA none."""

CUBLAS_WORKSPACE = 8 * 2**20 + 2**17
"""Bytes that torch gives to cuBLAS before Hopper, for each stream and thread that multiplies matrices."""

CUBLAS_WORKSPACES = 3 * CUBLAS_WORKSPACE
"""Those of a step."""

REFERENCE_UPDATE = {
    "adam": {False: 16, True: 48},
    "adam8bit": {False: 29, True: 56},
    "adam4bit": {False: 29, True: 56},
    "adafactor": {False: 29, True: 56},
}
"""Temporary bytes per element of the reference form of our update, by its state and whether its weights are bf16
(stochastic rounding needs most of them). Our kernels need none."""


@dataclasses.dataclass(frozen=True)
class WeightGroup:
    """A parameter group."""

    sizes: tuple[int, ...]
    """Elements of each parameter."""
    bits: int
    """Width of its state under adam8bit: 32 for norms, biases, embeddings and small tensors."""
    dtype: torch.dtype
    """Type of its weights in training."""
    factors: int = 0
    """Rows and columns of all its matrices."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(self.sizes)

    def weight_bytes(self) -> int:
        """Bytes of its weights, and also of their gradients."""
        return sum(rounded(n * self.dtype.itemsize) for n in self.sizes)


@dataclasses.dataclass(frozen=True)
class EngineLayout:
    """How a run stores and updates its weights."""

    optim: OptimConfig
    kernels: str
    """Value of --kernels."""
    device: str
    """ "cuda" or "cpu"."""
    ds: dict[str, Any] | None
    """Resolved DeepSpeed configuration; None for the plain engine."""
    world_size: int = 1

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16"."""
        return resolve_precision(self.optim, torch.device(self.device))

    @property
    def is_flat(self) -> bool:
        """Whether the weights lie in flat buffers."""
        return self.ds is None and is_flat(self.optim, self.has_kernels)

    @property
    def has_kernels(self) -> bool:
        """Whether our kernels run."""
        return self.device == "cuda" and self.kernels != "reference"

    @property
    def largest_group(self) -> float:
        """Largest number of elements in a parameter group."""
        return math.inf if self.ds is None else GROUP_ELEMENTS

    @property
    def stage(self) -> int | None:
        """ZeRO stage; None for the plain engine."""
        return None if self.ds is None else self.ds.get("zero_optimization", {}).get("stage", 0)

    def zero(self, key: str, default: Any) -> Any:
        """A value of zero_optimization in ds.json."""
        return (self.ds or {}).get("zero_optimization", {}).get(key, default)

    def offloads(self, what: str) -> bool:
        """Whether "optimizer" or "param" lies in CPU memory."""
        return (self.zero(f"offload_{what}", None) or {}).get("device", "none") != "none"

    @property
    def shards(self) -> int:
        """Number of processes that share the optimiser's state."""
        return self.world_size if self.stage else 1

    @property
    def bucket(self) -> int:
        """Elements of ZeRO's reduction bucket; 0 without one."""
        return int(self.zero("reduce_bucket_size", 5e8)) if self.stage else 0

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of the UNet's weights and of the graph modules' weights."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)
        if self.ds is not None:
            return half, half
        if self.optim.lora:  # the UNet's frozen weights; its adapters are in fp32
            return half, torch.float32
        return (torch.bfloat16 if self.optim.bf16_weights else torch.float32), torch.float32

    def autocast(self) -> torch.dtype | None:
        """Type that compute is cast to; None if the weights' own type decides."""
        if self.ds is not None or self.optim.bf16_weights:
            return None
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    def describe(self) -> str:
        """The layout as text."""
        if self.stage is not None:
            offload = " with offload" if self.offloads("optimizer") or self.offloads("param") else ""
            return f"{self.precision}, DeepSpeed ZeRO-{self.stage}{offload}, {self.world_size} process(es)"
        kinds = {"lean": "bf16 weights", "split": "fp32 weights in two halves"}
        kind = kinds.get(self.optim.weights, self.precision)
        if self.optim.lora:
            kind = f"{self.precision}, LoRA of rank {self.optim.lora} ({self.optim.lora_targets})"
        several = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{kind}, plain engine{', optimiser in backward' if self.optim.optimizer_in_backward else ''}{several}"


def state_bytes(group: WeightGroup, optimizer: str, shards: int = 1) -> int:
    """Bytes of both moments of Adam, or of Adafactor's means."""
    numel, state = -(-group.numel // shards), STATES[optimizer]
    if group.bits != 32 and state.get("factored"):
        return 4 * group.factors
    if group.bits == 32 or state["optim_bits"] == 32:
        return 8 * numel
    bits = state["optim_bits"]
    return 2 * (numel * bits // 8 + SCALE_BYTES * -(-numel // BLOCKS[bits]))


def update_bytes_per_element(layout: EngineLayout, group: WeightGroup) -> int:
    """Temporary bytes of the optimiser's arithmetic, per element that it updates at once."""
    if layout.is_flat:
        return (
            0
            if layout.has_kernels
            else REFERENCE_UPDATE["adam" if group.bits == 32 else layout.optim.optimizer][group.dtype == torch.bfloat16]
        )
    if layout.optim.optimizer == "adam":
        return 4 if layout.device == "cuda" else 8
    return CPU_UPDATE[group.bits] if layout.device == "cpu" else 0


def in_backward_bytes(layout: EngineLayout, group: WeightGroup) -> int:
    """Temporary bytes of an update in backward of the largest weight of a group."""
    return update_bytes_per_element(layout, group) * max(group.sizes)


def update_bytes(layout: EngineLayout, groups: list[WeightGroup]) -> int:
    """Temporary bytes of the update beside weights, state and gradients."""
    at_highest = 0
    for group in groups:
        numel = -(-group.numel // layout.shards)
        each, width = update_bytes_per_element(layout, group), group.dtype.itemsize
        to_fp32 = 4 if width < 4 else 0
        if layout.stage is None:  # torch's Adam updates a whole group at once on CUDA, all else a weight
            at_once = layout.optim.optimizer == "adam" and layout.device == "cuda"
            needs = each * (numel if at_once else max(group.sizes))
        elif layout.offloads("optimizer"):
            needs = 0 if layout.device == "cuda" else each * numel
        elif layout.stage in (1, 2):  # gradients flattened, then in fp32; then the flat ones are freed
            needs = max(width + to_fp32, 4 + each) * numel
        elif layout.stage == 3:
            needs = (to_fp32 + each) * min(numel, int(layout.zero("sub_group_size", 1e9)))
        else:
            needs = (to_fp32 + each) * numel
        at_highest = max(at_highest, needs)
    if layout.stage == 0 and layout.precision != "fp32":  # all gradients in fp32 at once
        at_highest = max(at_highest, 4 * sum(group.numel for group in groups))
    return at_highest


def resident_parts(layout: EngineLayout, groups: list[WeightGroup]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that are allocated all the time, by name: (on the device, in CPU memory)."""
    numel = sum(group.numel for group in groups)
    weights = sum(group.weight_bytes() for group in groups)
    shards, stage = layout.shards, layout.stage
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    state = sum(state_bytes(group, layout.optim.optimizer, shards) for group in groups)
    update_side = host if layout.offloads("optimizer") else device
    (host if layout.offloads("param") else device)["weights"] = weights // (shards if stage == 3 else 1)
    if stage == 3 and (layout.world_size > 1 or layout.offloads("param")):
        live = min(numel, int(layout.zero("stage3_max_live_parameters", 1e9)))
        device["gathered weights"] = live * groups[0].dtype.itemsize
    if stage or (stage == 0 and layout.precision != "fp32"):
        update_side["fp32 master weights"] = 4 * numel // shards
    update_side["optimiser state"] = state
    if layout.optim.weights == "split":
        device["low halves of the weights"] = sum(2 * g.numel for g in groups if g.dtype == torch.bfloat16)
    if layout.offloads("optimizer"):
        host["fp32 gradients and a copy of the weights"] = (4 * numel + weights) // shards
    if layout.optim.ema:
        (host if layout.optim.ema_device == "cpu" else device)["average of the weights (EMA)"] = 4 * numel // shards
    return device, host


def resident_blocks(layout: EngineLayout, groups: list[WeightGroup]) -> list[int]:
    """Sizes of the allocations on the device behind `resident_parts`: one a group, or one a weight.

    ZeRO 1 and 2 are left out, whose setting up `zero.py` follows.
    """
    resident, _ = resident_parts(layout, groups)
    if layout.stage in (1, 2):
        return []
    apart = layout.ds is None and not layout.is_flat
    blocks = []
    for size in resident.values():
        numel = sum(group.numel for group in groups)
        shares = [n for group in groups for n in group.sizes] if apart else [group.numel for group in groups]
        blocks += [size * share // numel for share in shares]
    return blocks


def address_bytes(groups: list[WeightGroup], optimizer: str) -> int:
    """Bytes of the table through which a captured optimiser finds the gradients: three numbers a chunk."""
    factored = STATES[optimizer].get("factored", False)
    return 24 * sum(num_chunks(group.sizes, "triton", factored and group.bits != 32) for group in groups)


def bucket_blocks(layout: EngineLayout, groups: list[WeightGroup]) -> list[int]:
    """Bytes of each reduction bucket beside the gradients that exists during backward, of ZeRO or of several processes.

    Without DeepSpeed a bucket becomes its gradients' memory, so one is there twice. A bucket may overrun its size by
    less than that. Where weights are updated in backward, those that are still on their way are kept too.
    """
    if layout.ds is None:
        if layout.world_size == 1:
            return []
        one = min(2 * BUCKET_BYTES, sum(group.weight_bytes() for group in groups))
        if not layout.optim.optimizer_in_backward:
            return [one]
        largest = max(n * group.dtype.itemsize for group in groups for n in group.sizes)
        return [max(one, largest)] * (1 + IN_FLIGHT)
    if not layout.bucket or not layout.zero("contiguous_gradients", True):
        return []
    number = 2 if layout.stage != 3 and layout.zero("overlap_comm", False) else 1
    return [layout.bucket * groups[0].dtype.itemsize] * number


def gradient_bytes(layout: EngineLayout, groups: list[WeightGroup]) -> int:
    """Bytes of the gradients that this process keeps until the update."""
    if layout.optim.optimizer_in_backward or layout.offloads("optimizer"):
        return 0
    total = sum(group.weight_bytes() for group in groups)
    return total // layout.shards if (layout.stage or 0) >= 2 else total


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a module."""
    return [p for p in module.parameters() if p.requires_grad]
