"""The memory planner: the memory of a fine-tuning run, part by part, before anything is allocated.

The stage is set up as in the run. It goes forward and backward on fake tensors, which `meter.py` counts; `parts.py`
computes what the engine keeps. Attention is planned as SDPA, which needs the same memory as xFormers. The CUDA context,
cuDNN's workspaces and the allocator's gaps are not counted; `OUTSIDE` stands for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.data.cache import RESIDENT_SHARE
from sgg_fast.train.assemble import assemble
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation, latent_factor
from sgg_fast.train.memory.meter import Meter, autocast_like_cuda
from sgg_fast.train.memory.parts import (
    Group,
    Layout,
    bucket_bytes,
    gradient_bytes,
    parameters_of,
    resident_parts,
    update_bytes,
    update_bytes_per_element,
)
from sgg_fast.train.optim.groups import parameter_groups

GIB = 2**30

OUTSIDE = GIB
"""Bytes of the budget reserved for what the plan does not count."""

LARGEST_BATCH = 4096
"""Upper bound of the batch search."""

GRAPH_BYTES = 4096
"""Upper bound of a packed graph: ids, pointers and message slots of 31 objects and 60 relations."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory of a step. All sizes in bytes."""

    title: str
    resident: dict[str, int]
    """Allocated on the device all the time, by part."""
    moments: dict[str, dict[str, int]]
    """Phase (forward, backward, update) -> what its highest point adds to `resident`."""
    host: dict[str, int]
    """In CPU memory, by part."""

    @property
    def when(self) -> str:
        """Phase of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Sizes at the peak by part, largest first."""
        found = {**self.resident, **self.moments[self.when]}
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return sum(self.parts.values())

    def fits(self, budget: int) -> bool:
        """Whether the peak and what is not counted stay within `budget`."""
        return self.peak + OUTSIDE <= budget

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        rows = [f"{name:42} {size / GIB:8.3f} GiB" for name, size in self.parts.items()]
        moments = ", ".join(
            f"{name} {(sum(self.resident.values()) + sum(extra.values())) / GIB:.2f}"
            for name, extra in self.moments.items()
        )
        host = [f"in CPU memory: {name:27} {size / GIB:8.3f} GiB" for name, size in self.host.items()]
        return [
            self.title,
            *rows,
            f"{'peak, in ' + self.when:42} {self.peak / GIB:8.3f} GiB  ({moments})",
            *host,
        ]


class Planner:
    """Plans one run's settings at any batch size. Its models are fake tensors, built once."""

    def __init__(
        self,
        config: Config,
        ds: dict[str, Any] | None = None,
        device: str = "cuda",
        world_size: int = 1,
        num_images: int | None = None,
        stored: bool | None = None,
    ) -> None:
        """Build the fake models.

        num_images: size of the training set (by default what the settings expect). stored: whether the set is a
        prepared cache, whose latents may stay on disk; by default True if --data is not given. Raises `ConfigError` if
        --model's configuration cannot be read.
        """
        self.config, self.layout = config, Layout(config.optim, config.model.kernels, device, ds, world_size)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._traces: dict[int, dict[str, dict[str, int]]] = {}
        with torch.random.fork_rng(devices=[]), self._mode:
            self.foundation = blank_foundation(config.model)
            of_unet, of_graph = self.layout.dtypes()
            _recast(self.foundation.unet, of_unet)
            self._stage = assemble(
                self._as_traced(),
                "finetune",
                self.foundation,
                blank_conditioner(config.model, self.foundation),
                blank_cache(config, self.foundation, 1),
                torch.device("cpu"),
                ds,
                context_fn=self._recomputing,
            )
            for name, module in self._stage.named_children():
                if name != "unet":
                    _recast(module, of_graph)
            self._groups = [
                Group(tuple(p.numel() for p in group["params"]), group["optim_bits"], group["params"][0].dtype)
                for group in parameter_groups(self._stage, config.optim, self.layout.largest_group)
            ]
        self._num_images = num_images if num_images is not None else config.data.num_expected
        self._stored = stored if stored is not None else not config.data.source

    def plan(self, batch: int, budget: int = 24 * GIB) -> Plan:
        """Plan for `batch` images a micro-batch and process."""
        resident, host = resident_parts(self.layout, self._groups)
        resident["frozen weights of the UNet (LoRA)"] = sum(
            p.nbytes for p in self._stage.unet.parameters() if not p.requires_grad
        )
        resident["frozen models"] = self._frozen_bytes()
        resident["training set (graphs, embeddings, latents)"] = self._data_bytes(budget)
        if self.layout.device == "cpu":
            resident, host = {**resident, **host}, {}
        moments = {phase: dict(parts) for phase, parts in self._trace(batch).items()}
        moments["backward"]["ZeRO's buckets"] = bucket_bytes(self.layout, self._groups)
        if not self.config.optim.optimizer_in_backward:
            gradients = gradient_bytes(self.layout, self._groups)
            temporaries = update_bytes(self.layout, self._groups)
            moments["update"] = {"gradients": gradients, "the update's temporaries": temporaries}
        config, micro, side = self.config, self.config.optim.accumulation_steps, self.config.data.resolution
        title = (
            f"fine-tuning {config.run.recipe} with {self.foundation.source} at {side} x {side}, "
            f"batch {batch}{f' x {micro}' if micro > 1 else ''}, "
            f"{self.layout.describe()}, on {'a GPU' if self.layout.device == 'cuda' else 'the CPU'}"
        )
        return Plan(title, resident, moments, host)

    def largest_batch(self, budget: int) -> int:
        """Largest micro-batch in images that fits `budget`; 0 if not even one image fits.

        The peak is a maximum of functions that are linear in the batch, hence convex. A chord lies above it, so a guess
        from a chord fits; an extension lies below. If chords creep along a plateau, the middle is tried.
        """
        below, low, high, crept = 0, 0, LARGEST_BATCH + 1, 0  # low fits or is 0, high does not
        while high - low > 1:
            if low < 2:
                guess = low + 1
            elif crept > 1:
                guess = (low + high) // 2
            else:
                a, b = (below, low) if high > LARGEST_BATCH else (low, high)
                at_a, at_b = self.plan(a, budget).peak, self.plan(b, budget).peak
                guess = a + (budget - OUTSIDE - at_a) * (b - a) // max(at_b - at_a, 1)
                guess = min(max(guess, low + 1), high - 1)
            if self.plan(guess, budget).fits(budget):
                below, low, crept = low, guess, crept + 1 if guess > 2 else 0
            else:
                high, crept = guess, 0
        return low

    def _frozen_bytes(self) -> int:
        models = [self.foundation.vae, self.foundation.clip]
        if self.config.model.token_init == "text" or self.layout.device == "cpu":
            models.append(self.foundation.text_encoder)
        return sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))

    def _data_bytes(self, budget: int) -> int:
        """Bytes of the set on the device. Latents of a prepared cache stay on disk if they would need too much."""
        side = self.config.data.resolution // latent_factor(self.foundation)
        latents = self._num_images * 4 * 2 * self.foundation.vae.config.latent_channels * side**2
        if self._stored and (self.layout.device == "cpu" or latents >= RESIDENT_SHARE * budget):
            latents = 0
        return latents + self._num_images * (4 * self.foundation.clip.config.projection_dim + GRAPH_BYTES)

    def _trace(self, batch: int) -> dict[str, dict[str, int]]:
        """Trace forward and backward of a step at `batch`: the highest point of each phase beside the resident
        parts."""
        if batch not in self._traces:
            stage, optim = self._stage, self.config.optim
            parameters = parameters_of(stage)
            bits = {id(p): g["optim_bits"] for g in parameter_groups(stage, optim) for p in g["params"]}

            def temporary(p: torch.Tensor) -> int:
                group = Group((p.numel(),), bits[id(p)], p.dtype)
                return p.numel() * update_bytes_per_element(self.layout, group)

            with ops.assumed(self._backend), self._mode, Meter() as meter:
                if optim.optimizer_in_backward:
                    meter.use_gradients(parameters, temporary)
                elif self.layout.stage in (1, 2, 3):
                    meter.bucket_gradients(parameters, self.layout.bucket, gradient_bytes(self.layout, self._groups))
                else:
                    meter.keep_gradients(parameters)
                for _ in range(min(optim.accumulation_steps, 2)):  # the second pass adds to the first's gradients
                    meter.phase = "forward"
                    with autocast_like_cuda(self.layout.autocast()):
                        total = stage(np.zeros(batch, np.int64), 0).total
                    meter.phase = "backward"
                    total.backward()
                    del total
                for parameter in parameters:
                    parameter.grad = None
            self._traces[batch] = meter.peaks
        return self._traces[batch]

    def _recomputing(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Contexts of a block's forward and of its recomputation: backward runs outside of `_trace`'s autocast."""
        return contextlib.nullcontext(), autocast_like_cuda(self.layout.autocast())

    def _as_traced(self) -> Config:
        """The settings with "auto" resolved for the run's device, which is not the device of the fake tensors."""
        config, on_gpu = self.config, self.layout.device == "cuda"
        fuse = ("on" if on_gpu else "off") if config.model.fuse_unet == "auto" else config.model.fuse_unet
        # Graphs with their relations need the most memory.
        return config.replace(relation_dropout=0.0, attention="sdpa", fuse_unet=fuse)

    @property
    def _backend(self) -> str:
        """Kernel backend of the run."""
        auto = "triton" if self.layout.device == "cuda" else "reference"
        return auto if self.config.model.kernels == "auto" else self.config.model.kernels


def _recast(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every floating parameter and buffer by one in `dtype`: fake ones cannot be converted in place."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                empty = torch.empty_like(parameter, dtype=dtype)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = torch.empty_like(buffer, dtype=dtype)
